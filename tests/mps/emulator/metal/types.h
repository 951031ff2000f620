// Metal's scalar and vector types, type traits and limits, as far as Inductor's kernels and c10/metal use them.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

// Rounds to nearest, ties to even; arithmetic between two bfloats rounds after each operation.
struct bfloat {
  ushort bits = 0;
  bfloat() = default;
  template <class T>
  constexpr explicit bfloat(T value) : bits(round(__builtin_bit_cast(uint, static_cast<float>(value)))) {}
  constexpr operator float() const { return __builtin_bit_cast(float, static_cast<uint>(bits) << 16); }
  bfloat& operator+=(bfloat other) { return *this = bfloat(float(*this) + float(other)); }

 private:
  static constexpr ushort round(uint value) {
    const bool is_nan = (value & 0x7fffffffu) > 0x7f800000u;
    return is_nan ? 0x7fc0 : static_cast<ushort>((value + 0x7fffu + ((value >> 16) & 1u)) >> 16);
  }
};
inline bfloat operator+(bfloat a, bfloat b) { return bfloat(float(a) + float(b)); }
inline bfloat operator-(bfloat a, bfloat b) { return bfloat(float(a) - float(b)); }
inline bfloat operator*(bfloat a, bfloat b) { return bfloat(float(a) * float(b)); }
inline bfloat operator/(bfloat a, bfloat b) { return bfloat(float(a) / float(b)); }

// The constants c10/metal takes from Metal's math library.
#undef M_PI_F
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.318309886183790671538f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.693147180559945309417f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524400f
#define M_2_SQRTPI_F 1.12837916709551257390f

#define VECTOR_TYPES(T, T2, T3, T4)                                  \
  struct T2 {                                                        \
    T x{}, y{};                                                      \
    T2() = default;                                                  \
    T2(T all) : x(all), y(all) {}                                    \
    T2(T a, T b) : x(a), y(b) {}                                     \
    T& operator[](int i) { return i == 0 ? x : y; }                  \
    T operator[](int i) const { return i == 0 ? x : y; }             \
  };                                                                 \
  struct T3 {                                                        \
    T x{}, y{}, z{};                                                 \
    T3() = default;                                                  \
    T3(T all) : x(all), y(all), z(all) {}                            \
    T3(T a, T b, T c) : x(a), y(b), z(c) {}                          \
    T& operator[](int i) { return i == 0 ? x : i == 1 ? y : z; }     \
    T operator[](int i) const { return i == 0 ? x : i == 1 ? y : z; } \
  };                                                                 \
  struct T4 {                                                        \
    T x{}, y{}, z{}, w{};                                            \
    T4() = default;                                                  \
    T4(T all) : x(all), y(all), z(all), w(all) {}                    \
    T4(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}               \
  };
VECTOR_TYPES(float, float2, float3, float4)
VECTOR_TYPES(half, half2, half3, half4)
VECTOR_TYPES(bfloat, bfloat2, bfloat3, bfloat4)
VECTOR_TYPES(char, char2, char3, char4)
VECTOR_TYPES(uchar, uchar2, uchar3, uchar4)
VECTOR_TYPES(short, short2, short3, short4)
VECTOR_TYPES(ushort, ushort2, ushort3, ushort4)
VECTOR_TYPES(int, int2, int3, int4)
VECTOR_TYPES(uint, uint2, uint3, uint4)
VECTOR_TYPES(long, long2, long3, long4)
VECTOR_TYPES(ulong, ulong2, ulong3, ulong4)
#undef VECTOR_TYPES

#define COMPLEX_ARITHMETIC(V)                                            \
  inline V operator+(V a, V b) { return V(a.x + b.x, a.y + b.y); }       \
  inline V operator-(V a, V b) { return V(a.x - b.x, a.y - b.y); }       \
  inline V operator*(V a, V b) { return V(a.x * b.x, a.y * b.y); }       \
  inline V operator/(V a, V b) { return V(a.x / b.x, a.y / b.y); }
COMPLEX_ARITHMETIC(float2)
COMPLEX_ARITHMETIC(half2)
#undef COMPLEX_ARITHMETIC

template <class To, class From>
inline To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  std::memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(To));
  return to;
}

namespace metal {

using std::conditional_t;
using std::declval;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::remove_reference_t;
using std::true_type;
template <class T, unsigned long N>
using array = std::array<T, N>;

template <class T>
constexpr bool is_small_float_v = std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
template <class A, class B>
constexpr bool is_same_v = std::is_same_v<A, B>;
template <class T>
constexpr bool is_floating_point_v = std::is_floating_point_v<T> || is_small_float_v<T>;
template <class T>
constexpr bool is_integral_v = std::is_integral_v<T>;
template <class T>
constexpr bool is_signed_v = std::is_signed_v<T> || is_small_float_v<T>;
template <class T>
constexpr bool is_unsigned_v = std::is_unsigned_v<T>;
template <class T>
constexpr bool is_scalar_v = std::is_scalar_v<T> || is_small_float_v<T>;

template <class T>
struct numeric_limits : std::numeric_limits<T> {};
template <class T>
struct small_float_limits {
  static constexpr bool is_signed = true;
  static constexpr T infinity() { return T(__builtin_inff()); }
  static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }
};
template <>
struct numeric_limits<half> : small_float_limits<half> {
  static constexpr half max() { return half(65504.0f); }
  static constexpr half lowest() { return half(-65504.0f); }
  static constexpr half min() { return half(6.103515625e-05f); }
  static constexpr half epsilon() { return half(9.765625e-04f); }
};
template <>
struct numeric_limits<bfloat> : small_float_limits<bfloat> {
  static constexpr bfloat max() { return bfloat(3.3895313892515355e38f); }
  static constexpr bfloat lowest() { return bfloat(-3.3895313892515355e38f); }
  static constexpr bfloat min() { return bfloat(1.17549435e-38f); }
  static constexpr bfloat epsilon() { return bfloat(0.0078125f); }
};

}  // namespace metal
