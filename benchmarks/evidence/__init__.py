"""Evidence on real tasks: accuracy beside other methods, and what each choice within AdaMSS is worth."""
