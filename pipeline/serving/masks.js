// Turns the maps of an answer into canvas pixels. Independent of the page's elements.

const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

/** Grey values of a base64 PNG, exactly as stored. */
async function decodeMap(base64) {
  const bytes = Uint8Array.from(atob(base64), character => character.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], {type: "image/png"}), {colorSpaceConversion: "none"});
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const grey = new Uint8Array(rgba.length / 4);
  for (let i = 0; i < grey.length; i++) grey[i] = rgba[4 * i];
  return grey;
}

/** The answer with its maps decoded. */
export async function decodeAnswer(reply) {
  const maps = await Promise.all(reply.maps.map(decodeMap));
  const answer = {...reply, maps};
  if (reply.kind === "labels") {
    const [confidence, low, high] = maps;
    const ids = Uint16Array.from(low);
    if (high) for (let i = 0; i < ids.length; i++) ids[i] += 256 * high[i];
    answer.maps = {ids, confidence};
  }
  return answer;
}

/**
 * The winning visible prompt of each pixel, and its strength.
 *
 * Returns {winner: Int32Array (-1 is none), strength: Uint8Array}. The strength is that of the best visible
 * prompt, also where it is below the threshold (0 to 255).
 */
export function decide(answer, visible, threshold) {
  const size = answer.width * answer.height;
  const winner = new Int32Array(size).fill(-1), strength = new Uint8Array(size);
  if (answer.kind === "labels") {
    const {ids, confidence} = answer.maps;
    for (let i = 0; i < size; i++) {
      if (!visible[ids[i]]) continue;
      strength[i] = confidence[i];
      if (confidence[i] >= threshold) winner[i] = ids[i];
    }
    return {winner, strength};
  }
  answer.maps.forEach((map, id) => {
    if (!visible[id]) return;
    for (let i = 0; i < size; i++) {
      if (map[i] <= strength[i]) continue;
      strength[i] = map[i];
      if (map[i] >= threshold) winner[i] = id;
    }
  });
  return {winner, strength};
}

/** Share of the image covered by each id. */
export function shares(winner, count) {
  const areas = new Float64Array(count);
  for (const id of winner) if (id >= 0) areas[id]++;
  return Array.from(areas, area => area / winner.length);
}

/** Masks in the colours of their ids; the edges are a little stronger. */
export function paintMasks({winner}, width, height, colors) {
  const image = new ImageData(width, height), out = new Uint32Array(image.data.buffer);
  const solid = colors.map(([r, g, b]) => (255 << 24 | b << 16 | g << 8 | r) >>> 0);
  const soft = colors.map(([r, g, b]) => (205 << 24 | b << 16 | g << 8 | r) >>> 0);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const id = winner[i];
      if (id < 0) continue;
      const edge = (x > 0 && winner[i - 1] !== id) || (x + 1 < width && winner[i + 1] !== id)
        || (y > 0 && winner[i - width] !== id) || (y + 1 < height && winner[i + width] !== id);
      out[i] = edge ? solid[id] : soft[id];
    }
  }
  return image;
}

/** The strength as a heat map. */
export function paintHeat({strength}, width, height) {
  const image = new ImageData(width, height), out = new Uint32Array(image.data.buffer);
  const table = Uint32Array.from({length: 256}, (_, value) => {
    const place = value / 255 * (VIRIDIS.length - 1), low = Math.min(Math.floor(place), VIRIDIS.length - 2);
    const [r, g, b] = VIRIDIS[low].map((c, k) => Math.round(c + (place - low) * (VIRIDIS[low + 1][k] - c)));
    return (255 << 24 | b << 16 | g << 8 | r) >>> 0;
  });
  for (let i = 0; i < out.length; i++) out[i] = table[strength[i]];
  return image;
}

/** [r, g, b] of "#rrggbb". */
export const rgb = hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));

/**
 * An indexed PNG at the size of the image: 0 is nothing and transparent, id + 1 the prompts in their colours.
 *
 * Above 255 ids no palette fits: the result is a 16-bit grey PNG.
 */
export async function indexedPng({winner}, width, height, outWidth, outHeight, colors) {
  const wide = colors.length > 255, bytes = wide ? 2 : 1;
  const raw = new Uint8Array(outHeight * (bytes * outWidth + 1));
  for (let y = 0, at = 0; y < outHeight; y++) {
    raw[at++] = 0; // this row is not filtered
    const row = width * Math.min(height - 1, Math.floor((y + .5) * height / outHeight));
    for (let x = 0; x < outWidth; x++) {
      const id = winner[row + Math.min(width - 1, Math.floor((x + .5) * width / outWidth))] + 1;
      if (wide) raw[at++] = id >> 8;
      raw[at++] = id & 255;
    }
  }
  const packed = new Response(new Blob([raw]).stream().pipeThrough(new CompressionStream("deflate")));
  const header = new Uint8Array(13), view = new DataView(header.buffer);
  view.setUint32(0, outWidth);
  view.setUint32(4, outHeight);
  header.set([8 * bytes, wide ? 0 : 3, 0, 0, 0], 8);
  const palette = wide ? [] : [chunk("PLTE", Uint8Array.from([[0, 0, 0], ...colors].flat())), chunk("tRNS", Uint8Array.of(0))];
  return new Blob([
    Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10), chunk("IHDR", header), ...palette,
    chunk("IDAT", new Uint8Array(await packed.arrayBuffer())), chunk("IEND", new Uint8Array(0)),
  ], {type: "image/png"});
}

function chunk(name, data) {
  const out = new Uint8Array(data.length + 12), view = new DataView(out.buffer);
  view.setUint32(0, data.length);
  for (let i = 0; i < 4; i++) out[4 + i] = name.charCodeAt(i);
  out.set(data, 8);
  view.setUint32(data.length + 8, crc(out.subarray(4, data.length + 8)));
  return out;
}

const CRC = Uint32Array.from({length: 256}, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ n >>> 1 : n >>> 1;
  return n >>> 0;
});

function crc(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = CRC[(value ^ byte) & 255] ^ value >>> 8;
  return (value ^ 0xffffffff) >>> 0;
}
