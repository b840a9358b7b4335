"""Generation by a tensor- and pipeline-parallel GPT with a key/value cache: token ids in, token ids out."""
