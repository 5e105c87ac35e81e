"""Stage 1, shared by several methods: what is each token worth? Higher = keep."""
