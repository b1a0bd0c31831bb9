"""fastpage-grpc: the service fastpage.v1.Fastpage."""
