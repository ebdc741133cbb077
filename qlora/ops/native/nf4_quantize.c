/* 4-bit block quantization, bit-equal to bitsandbytes 0.50 on CPUs.

   A block's scale is its largest magnitude, a weight becomes v = x * (1 / scale) in fp32, and its code depends on how many
   of the 15 midpoints between neighbouring values lie below v. All 15 are compared with: the compiler makes vectors of
   that, and there is no branch and no table. The loops have lengths known to the compiler, and what lies between them
   stays in the first cache.

   No options that change arithmetic may be given (-ffast-math and the like). */

#include <stdint.h>
#include <string.h>

enum { PIECE = 32, TILE = 64, MIDPOINTS = 15 };
enum { BF16 = 0, FP16 = 1, FP32 = 2 };

/* Between these the reciprocal is a normal number, and far from bitsandbytes' own lowest scale, 1e-38. */
static const float SMALLEST_SCALE = 1e-30f, LARGEST_SCALE = 0x1p126f;

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float from_bf16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

/* Integers and one subtraction: subnormal numbers of fp16 never become such of fp32, which are slow. Not for inf and NaN. */
static inline float from_fp16(uint16_t bits) {
    uint32_t magnitude = (uint32_t)(bits & 0x7fff) << 13;
    uint32_t normal = magnitude + 0x38000000u; /* the exponent's bias is 127 instead of 15 */
    float small = float_of(normal + 0x00800000u) - 0x1p-14f;
    uint32_t subnormal;
    memcpy(&subnormal, &small, sizeof subnormal);
    return float_of((magnitude < 0x00800000u ? subnormal : normal) | (uint32_t)(bits & 0x8000) << 16);
}

/* The largest magnitude of a block, as bits, whose order as integers is that of the numbers, with inf and NaN above all. */
static uint16_t largest_of_16_bits(const uint16_t *weight, int64_t length) {
    uint16_t largest = 0;
    for (int64_t start = 0; start < length; start += PIECE)
        for (int i = 0; i < PIECE; i++) {
            uint16_t magnitude = weight[start + i] & 0x7fff;
            largest = magnitude > largest ? magnitude : largest;
        }
    return largest;
}

static uint32_t largest_of_32_bits(const uint32_t *weight, int64_t length) {
    uint32_t largest = 0;
    for (int64_t start = 0; start < length; start += PIECE)
        for (int i = 0; i < PIECE; i++) {
            uint32_t magnitude = weight[start + i] & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
    return largest;
}

/* TILE scaled weights to TILE / 2 bytes, the first weight in the high half. */
static void encode(const float *restrict scaled, const float *restrict midpoints, const int32_t *restrict steps,
                   int32_t first_code, uint8_t *restrict packed) {
    uint8_t codes[TILE];
    for (int i = 0; i < TILE; i++) {
        int32_t code = first_code;
        for (int k = 0; k < MIDPOINTS; k++) code += steps[k] & -(int32_t)(scaled[i] > midpoints[k]);
        codes[i] = (uint8_t)code;
    }
    for (int i = 0; i < TILE / 2; i++) packed[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
}

/* Quantize whole blocks.

   kind         of the weights: BF16, FP16 or FP32
   weight       (num_blocks * block_size,), a multiple of TILE altogether; block_size is a multiple of PIECE
   midpoints    (15,), ascending
   first_code   of a weight that no midpoint lies below
   steps        (15,): what a midpoint adds to the code of the weights above it
   packed       (num_blocks * block_size / 2,), out
   scales       (num_blocks,), out

   Returns 0, or 1 where a scale is not finite, next to nothing or next to infinite; packed and scales are then unfinished. */
int qlora_quantize_4bit(int kind, const void *weight, int64_t num_blocks, int64_t block_size, const float *midpoints,
                        int32_t first_code, const int32_t *steps, uint8_t *packed, float *scales) {
    const uint16_t *halves = weight;
    const uint32_t *floats = weight;
    float scaled[TILE];
    int filled = 0;
    for (int64_t block = 0; block < num_blocks; block++) {
        int64_t start = block * block_size;
        float scale;
        if (kind == FP32) {
            scale = float_of(largest_of_32_bits(floats + start, block_size));
        } else {
            uint16_t largest = largest_of_16_bits(halves + start, block_size);
            if (kind == FP16 && largest >= 0x7c00) return 1;
            scale = kind == FP16 ? from_fp16(largest) : from_bf16(largest);
        }
        /* NaN is in no range. A block of zeros stays one, whatever it is multiplied with. */
        if (scale != 0 && !(scale >= SMALLEST_SCALE && scale <= LARGEST_SCALE)) return 1;
        scales[block] = scale;
        float inverse = scale == 0 ? 1.0f : 1.0f / scale;
        for (int64_t piece = start; piece < start + block_size; piece += PIECE) {
            float *out = scaled + filled;
            if (kind == BF16) {
                for (int i = 0; i < PIECE; i++) out[i] = from_bf16(halves[piece + i]) * inverse;
            } else if (kind == FP16) {
                for (int i = 0; i < PIECE; i++) out[i] = from_fp16(halves[piece + i]) * inverse;
            } else {
                for (int i = 0; i < PIECE; i++) out[i] = float_of(floats[piece + i]) * inverse;
            }
            filled += PIECE;
            if (filled == TILE) {
                encode(scaled, midpoints, steps, first_code, packed);
                packed += TILE / 2;
                filled = 0;
            }
        }
    }
    return 0;
}
