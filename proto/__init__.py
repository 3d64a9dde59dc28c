"""The wire contract and its generated code; imports nothing of ours."""
