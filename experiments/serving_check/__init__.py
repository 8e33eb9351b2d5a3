"""Does a vLLM server give the answers of Hugging Face?"""
