"""Stage 3, shared by several methods: who stays, and who joins whom?"""
