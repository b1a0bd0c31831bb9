"""Code generated from proto/fastpage/v1 at build time: fastpage_pb2, fastpage_pb2_grpc."""
