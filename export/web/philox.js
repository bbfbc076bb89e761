/**
 * The random numbers of NumPy: `Generator(Philox(key=[seed, index])).standard_normal(dtype=float32)`, bit by bit.
 *
 * Philox4x64-10 is that of Salmon et al. (Parallel random numbers: as easy as 1, 2, 3; 2011). The normal numbers are
 * those of the ziggurat method (Marsaglia and Tsang, 2000) with 256 layers, in NumPy's order of draws.
 */

const MASK = (1n << 64n) - 1n;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];
const ROUNDS = 10;

/** The four 64-bit words of a block. counter: four BigInt words; key: two. */
export function philox(counter, key) {
  let [a, b, c, d] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < ROUNDS; round++) {
    const first = MULTIPLIERS[0] * a;
    const second = MULTIPLIERS[1] * c;
    [a, b, c, d] = [(second >> 64n) ^ b ^ k0, second & MASK, (first >> 64n) ^ d ^ k1, first & MASK];
    k0 = (k0 + WEYL[0]) & MASK;
    k1 = (k1 + WEYL[1]) & MASK;
  }
  return [a, b, c, d];
}

/** A function that returns the next 32 bits of a key's stream; of each 64-bit word the low half comes first. */
export function uint32Stream(key) {
  const words = new Uint32Array(8);
  let block = 0n; // fewer than 2^64 blocks are ever drawn, so only the first word of the counter changes
  let used = 8;
  return () => {
    if (used === 8) {
      block += 1n;
      philox([block, 0n, 0n, 0n], key).forEach((word, i) => {
        words[2 * i] = Number(word & 0xffffffffn);
        words[2 * i + 1] = Number(word >> 32n);
      });
      used = 0;
    }
    return words[used++];
  };
}

const LAYERS = 256;
const EDGE = 3.6541528853610088; // where the tail begins
const AREA = 0.004928673233974655; // of each layer, the lowest one with the tail
const MANTISSA = 2 ** 23;

const { round, exp, log, sqrt, log1p, fround } = Math;
const density = (x) => exp(-0.5 * x * x);

/**
 * The layers: a number of 23 bits times `width` is x; below `inside` it is certainly under the curve, whose height at
 * the layer's edge is `height`. All are computed in double precision; rounded to float32 they are NumPy's constants.
 */
function ziggurat() {
  const inside = new Uint32Array(LAYERS);
  const width = new Float32Array(LAYERS);
  const height = new Float32Array(LAYERS);
  const base = AREA / density(EDGE);
  inside[0] = round((EDGE / base) * MANTISSA);
  width[0] = base / MANTISSA;
  width[LAYERS - 1] = EDGE / MANTISSA;
  height[0] = 1;
  height[LAYERS - 1] = density(EDGE);
  let above = EDGE;
  for (let layer = LAYERS - 2; layer > 0; layer--) {
    const x = sqrt(-2 * log(AREA / above + density(above)));
    inside[layer + 1] = round((x / above) * MANTISSA);
    width[layer] = x / MANTISSA;
    height[layer] = density(x);
    above = x;
  }
  return { inside, width, height };
}

const { inside, width, height } = ziggurat();
const EDGE_F = fround(EDGE);
const INVERSE_EDGE_F = fround(1 / EDGE);

/** `count` standard normal numbers, Float32Array. seed, index: BigInt, number or digits, 0 to 2^64 - 1. */
export function standardNormal(seed, index, count) {
  const next = uint32Stream([BigInt(seed), BigInt(index)]);
  const uniform = () => fround((next() >>> 8) / 2 ** 24);
  const exponential = () => -fround(log1p(-uniform()));
  const normal = () => {
    for (;;) {
      const bits = next();
      const layer = bits & 0xff;
      const isNegative = (bits >>> 8) & 1;
      const magnitude = bits >>> 9;
      const distance = fround(magnitude * width[layer]);
      const x = isNegative ? -distance : distance;
      if (magnitude < inside[layer]) return x;
      if (layer === 0) {
        for (;;) {
          const beyond = fround(INVERSE_EDGE_F * exponential());
          const depth = exponential();
          if (fround(depth + depth) > fround(beyond * beyond)) {
            const tail = fround(EDGE_F + beyond);
            return (magnitude >>> 8) & 1 ? -tail : tail;
          }
        }
      }
      const slab = fround(height[layer - 1] - height[layer]);
      if (fround(fround(slab * uniform()) + height[layer]) < exp(-0.5 * x * x)) return x;
    }
  };
  return Float32Array.from({ length: count }, normal);
}
