# Compiles the parser of the outputs against DeepStream's headers.
DEEPSTREAM ?= /opt/nvidia/deepstream/deepstream
CUDA ?= /usr/local/cuda

libresvit_parser.so: resvit_parser.cpp resvit_bundle.h
	$(CXX) -std=c++17 -O2 -Wall -Wextra -fPIC -shared -I$(DEEPSTREAM)/sources/includes -I$(CUDA)/include -o $@ $<
