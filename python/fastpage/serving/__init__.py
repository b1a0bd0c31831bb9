"""The gRPC server and its command line clients."""
