"""Commands that are more than reading: `plan`, `replay`, `submit`.

Each file is one command and starts with its function. Imports anything else of the search but
`run` and `monitor`.
"""
