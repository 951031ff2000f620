// Metal's math functions in float; half and bfloat compute in float and round, as Metal's typed overloads do.
#pragma once
#include "types.h"

#define FOR_EACH_UNARY(_)                                                                            \
  _(exp, ::expf(x)) _(exp2, ::exp2f(x)) _(log, ::logf(x)) _(log2, ::log2f(x)) _(log10, ::log10f(x))  \
  _(sin, ::sinf(x)) _(cos, ::cosf(x)) _(tan, ::tanf(x)) _(asin, ::asinf(x)) _(acos, ::acosf(x))      \
  _(atan, ::atanf(x)) _(sinh, ::sinhf(x)) _(cosh, ::coshf(x)) _(tanh, ::tanhf(x))                    \
  _(asinh, ::asinhf(x)) _(acosh, ::acoshf(x)) _(atanh, ::atanhf(x))                                  \
  _(sinpi, float(std::sin(3.14159265358979323846L * x)))                                             \
  _(cospi, float(std::cos(3.14159265358979323846L * x)))                                             \
  _(sqrt, ::sqrtf(x)) _(rsqrt, 1.0f / ::sqrtf(x)) _(fabs, ::fabsf(x)) _(abs, ::fabsf(x))             \
  _(floor, ::floorf(x)) _(ceil, ::ceilf(x)) _(trunc, ::truncf(x)) _(rint, ::rintf(x))                \
  _(round, ::roundf(x)) _(fract, x - ::floorf(x)) _(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x)

#define FOR_EACH_BINARY(_)                                                                            \
  _(pow, ::powf(a, b)) _(atan2, ::atan2f(a, b)) _(fmod, ::fmodf(a, b)) _(copysign, ::copysignf(a, b)) \
  _(divide, a / b)

#define UNARY(name, expression)                                        \
  inline float name(float x) { return expression; }                    \
  inline half name(half value) { float x = value; return half(expression); } \
  inline bfloat name(bfloat value) { float x = value; return bfloat(expression); }
#define BINARY(name, expression)                                       \
  inline float name(float a, float b) { return expression; }           \
  inline half name(half left, half right) { float a = left, b = right; return half(expression); } \
  inline bfloat name(bfloat left, bfloat right) { float a = left, b = right; return bfloat(expression); }
#define ALL_MATH                                                       \
  FOR_EACH_UNARY(UNARY)                                                \
  FOR_EACH_BINARY(BINARY)                                              \
  inline float sincos(float x, float& cosine) { cosine = ::cosf(x); return ::sinf(x); }

namespace metal {

ALL_MATH
namespace precise {
ALL_MATH
}
namespace fast {
ALL_MATH
}

inline float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
inline float ldexp(float x, int exponent) { return ::ldexpf(x, exponent); }

template <class T, enable_if_t<is_integral_v<T>, bool> = true>
inline T abs(T x) {
  return x < T(0) ? T(-x) : x;
}
template <class T>
inline bool isnan(T x) {
  return std::isnan(float(x));
}
template <class T>
inline bool isinf(T x) {
  return std::isinf(float(x));
}
template <class T>
inline bool isfinite(T x) {
  return std::isfinite(float(x));
}
template <class T>
inline bool signbit(T x) {
  return std::signbit(float(x));
}
template <class T>
inline bool isunordered(T a, T b) {
  return isnan(a) || isnan(b);
}
// Metal's max and min return the other operand when one is NaN.
template <class T>
inline T max(T a, T b) {
  if constexpr (is_floating_point_v<T>) {
    if (isnan(a)) return b;
    if (isnan(b)) return a;
  }
  return a < b ? b : a;
}
template <class T>
inline T min(T a, T b) {
  if constexpr (is_floating_point_v<T>) {
    if (isnan(a)) return b;
    if (isnan(b)) return a;
  }
  return b < a ? b : a;
}
template <class T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T>
inline T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}
inline float dot(float2 a, float2 b) { return a.x * b.x + a.y * b.y; }
inline half dot(half2 a, half2 b) { return a.x * b.x + a.y * b.y; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
inline ulong ctz(ulong x) { return x ? __builtin_ctzl(x) : 64; }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint popcount(uint x) { return __builtin_popcount(x); }

}  // namespace metal

#undef ALL_MATH
#undef UNARY
#undef BINARY
#undef FOR_EACH_UNARY
#undef FOR_EACH_BINARY
