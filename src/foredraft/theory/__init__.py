"""Theory: what speculative decoding costs and gains, computed exactly. Letters as in Yin et al. (arXiv 2411.00841): p is the
draft law, q the target's."""
