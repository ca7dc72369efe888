"""Theory of speculative decoding: its rejections, losses and speed-ups, computed exactly.

A law is a probability distribution over tokens. The letters are those of Yin et al. (arXiv 2411.00841): p is the draft law, q
the target law.
"""
