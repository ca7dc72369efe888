"""What every part speaks: parameters, trees, draws, laws, contracts, outputs."""
