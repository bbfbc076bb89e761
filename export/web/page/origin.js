/**
 * What a saved PNG says about its origin, as in dsd_serve/imaging/provenance.py: that a model made it (IPTC, in XMP),
 * and the settings that draw it again.
 */

const SIGNATURE_AND_HEADER = 8 + 25; // bytes: text may follow right after the header
const SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/";
const DRAWN = `${SOURCE}trainedAlgorithmicMedia`;
const EDITED = `${SOURCE}compositeWithTrainedAlgorithmicMedia`;

/**
 * A PNG with the mark and the settings in it.
 * @param {Blob} png
 * @param {object} settings  by their names in the HTTP API
 * @param {boolean} isDrawn  from noise, and not from a photo
 */
export async function withOrigin(png, settings, isDrawn) {
  const bytes = new Uint8Array(await png.arrayBuffer());
  const texts = { dsd: json(settings), "XML:com.adobe.xmp": xmp(isDrawn ? DRAWN : EDITED) };
  const chunks = Object.entries(texts).map(([key, text]) => internationalText(key, text));
  return new Blob([bytes.subarray(0, SIGNATURE_AND_HEADER), ...chunks, bytes.subarray(SIGNATURE_AND_HEADER)], {
    type: "image/png",
  });
}

/** JSON in which seed and index, strings of digits here, are numbers, exact beyond 2^53 too. */
function json(settings) {
  return JSON.stringify(settings).replace(/"(seed|index)":"(\d+)"/g, '"$1":$2');
}

function xmp(source) {
  return (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">' +
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" ' +
    `xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType="${source}"/>` +
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
  );
}

/** A chunk iTXt: keyword, no compression, no language, text in UTF-8. */
function internationalText(key, text) {
  const content = new TextEncoder().encode(`iTXt${key}\0\0\0\0\0${text}`);
  const chunk = new Uint8Array(4 + content.length + 4);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, content.length - 4);
  chunk.set(content, 4);
  view.setUint32(4 + content.length, crc32(content));
  return chunk;
}

/** The checksum of a chunk of PNG (ISO 3309). */
function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}
