"""The engine behind LLM and the servers: arguments, assembly, output processing, asyncio."""
