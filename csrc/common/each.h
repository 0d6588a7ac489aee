// A macro for each of up to four things: SSLFAST_EACH(f, float, double) is f(float) f(double).
#pragma once

#define SSLFAST_EACH(f, first, ...) f(first) __VA_OPT__(SSLFAST_EACH_OF_3(f, __VA_ARGS__))
#define SSLFAST_EACH_OF_3(f, first, ...) f(first) __VA_OPT__(SSLFAST_EACH_OF_2(f, __VA_ARGS__))
#define SSLFAST_EACH_OF_2(f, first, ...) f(first) __VA_OPT__(SSLFAST_EACH_OF_1(f, __VA_ARGS__))
#define SSLFAST_EACH_OF_1(f, first) f(first)
