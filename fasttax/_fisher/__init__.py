"""How DiagonalFisher works: taps on a model's layers, the pieces they leave, and the sums of squares made of them."""
