"""What every family stands on: checks and their errors, the op library, files, devices. Private."""
