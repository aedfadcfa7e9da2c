"""How EWC works: a Fisher fitted to a model, what is stored of it, and how it reaches an optimizer."""
