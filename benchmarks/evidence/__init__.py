"""Evidence on real tasks: accuracy compared with other methods, and the effect of each choice within AdaMSS."""
