"""Tests on a CUDA device that is simulated on the CPU: devices and dispatch are real. See device.cpp for its limits."""
