from musiclm_fast.ops.hyper_connection.op import hyper_connection
from musiclm_fast.ops.hyper_connection.reference import hyper_connection_reference

__all__ = ["hyper_connection", "hyper_connection_reference"]
