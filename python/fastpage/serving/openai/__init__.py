"""fastpage-openai: an HTTP server that speaks OpenAI's API."""
