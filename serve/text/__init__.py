"""Text: token ids to characters, and the strings that stop a sequence."""
