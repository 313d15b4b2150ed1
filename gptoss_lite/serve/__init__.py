"""The server: the hosted gpt-oss API on one machine of one's own."""
