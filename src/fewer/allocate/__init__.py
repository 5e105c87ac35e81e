"""Stage 2, shared by several methods: how many survive at each head and layer? Totals are met exactly."""
