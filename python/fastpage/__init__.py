"""fastpage: LLM serving around PagedAttention and continuous batching."""
