/** Taking a photo with the camera of the device. */

import { PhotoError, squareOf } from "./photo_file.js";
import { button, element, notify } from "./words.js";

/** Whether this page may ask for a camera: browsers offer none over plain http, except on localhost. */
export const hasCamera = Boolean(navigator.mediaDevices?.getUserMedia);

const REASONS = {
  NotAllowedError: "This page may not use the camera. Allow it in the settings of the browser, or choose a file.",
  NotFoundError: "This device has no camera that the browser can use. Choose a file instead.",
  NotReadableError: "Another program is using the camera. Close that program, or choose a file.",
};

/** Ask for a photo; null if the visitor closes the dialog, or there is no camera, which a notice says. */
export async function takePhoto(side) {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "environment", width: { ideal: 1280 } },
    });
  } catch (error) {
    notify(REASONS[error.name] ?? `The camera does not start: ${error.message}. Choose a file instead.`);
    return null;
  }
  const video = element("video", { muted: true, playsInline: true, autoplay: true });
  video.srcObject = stream;
  const dialog = element("dialog", { class: "camera", "aria-label": "Take a photo" }, video);
  try {
    return await new Promise((resolve, reject) => {
      const take = () => {
        if (video.videoWidth) resolve(squareOf(video, video.videoWidth, video.videoHeight, side));
        else reject(new PhotoError("The camera has sent no image yet. Try again."));
      };
      const row = element(
        "div",
        { class: "actions" },
        button("Take the photo", take, { class: "primary" }),
        button("Cancel", () => resolve(null)),
      );
      dialog.append(row);
      dialog.onclose = () => resolve(null);
      document.body.append(dialog);
      dialog.showModal();
    });
  } finally {
    for (const track of stream.getTracks()) track.stop();
    dialog.close();
    dialog.remove();
  }
}
