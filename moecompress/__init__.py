"""moecompress: post-training compression of Mixture-of-Experts language models (quantize, prune, merge)."""
