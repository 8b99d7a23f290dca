// Boxes in answers, and the images they are in.

const BOX = /\[\s*(\d{3})\s*,\s*(\d{3})\s*,\s*(\d{3})\s*,\s*(\d{3})\s*\]/g;
const ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"];
const NOUN = "(?:image|picture|photo)";
const NAME = new RegExp(`\\b(?:${NOUN} ?#?(\\d+)|(${ORDINALS.join("|")}) ${NOUN})\\b`, "gi");

/**
 * The boxes of an answer whose image is known, and a note if there are others.
 *
 * Models write boxes without an image. Where there are several images, a box belongs to the one
 * that its line names ("image 2", "the second picture"); if the line names none, to the one that
 * the question names; if that names none either, to the only one that came with the question. Other
 * boxes are not drawn, since a box in the wrong image is worse than none.
 *
 * Takes `question`, `answer`, `about` (items that the question is about) and `images` (items of
 * kind "image" by number). Returns `boxes`, each with its item, number and text, and corners x1,
 * y1, x2, y2 in thousandths of the image's width or height.
 */
export function boxesOf({ question, answer, about, images }) {
  const single = about.length === 1 ? about[0] : null;
  const named = (text) => (images.length === 1 && single ? undefined : imageNamed(text, images));
  const asked = named(question) ?? single;
  const boxes = [];
  let number = 0;
  let unknown = false;
  for (const line of answer.split("\n")) {
    const item = named(line) ?? asked;
    for (const match of line.matchAll(BOX)) {
      const corners = match.slice(1).map(Number);
      if (corners[2] < corners[0] || corners[3] < corners[1]) continue;
      number += 1;
      if (item?.kind === "image") boxes.push({ item, number, text: match[0], corners });
      else unknown = true;
    }
  }
  return { boxes, note: unknown && about.length ? noteFor(about) : "" };
}

/** The image that a text names; undefined if it names none, false if several or a missing one. */
function imageNamed(text, images) {
  const numbers = new Set();
  for (const [, digits, ordinal] of text.matchAll(NAME)) {
    numbers.add(digits ? Number(digits) : ORDINALS.indexOf(ordinal.toLowerCase()) + 1);
  }
  if (!numbers.size) return undefined;
  const [number] = numbers;
  return (numbers.size === 1 && images[number - 1]) || false;
}

function noteFor(about) {
  if (about.every((item) => item.kind === "video")) return "Boxes are not drawn on videos.";
  return 'It is not clear which image the boxes are in. Name one in the question: "image 1".';
}
