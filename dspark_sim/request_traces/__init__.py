"""Recorded traces of requests, of several formats, as one type."""

from dspark_sim.request_traces.formats import FORMATS, TraceFormat
from dspark_sim.request_traces.read import RequestTrace, read_request_trace

__all__ = ["FORMATS", "RequestTrace", "TraceFormat", "read_request_trace"]
