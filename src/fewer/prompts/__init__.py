"""Shorter prompts: text in units, ranked by a method, kept to an exact budget, with a way back.

Source    documents, a question, what is protected           source.py
Ranking   a value for each unit of text, from a method       source.py
settle    which units stay, so that the budget is met        settle.py
Compression   the text, where each piece came from, a patch  compression.py
"""
