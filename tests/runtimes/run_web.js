// Run files of the judge with onnxruntime-web in WebAssembly; prints a JSON line a file.
const fs = require("fs");
const path = require("path");

const [, , packages, folder] = process.argv;
const ort = require(path.join(packages, "node_modules", "onnxruntime-web"));
ort.env.wasm.numThreads = 1;

// small files share one buffer in Node, so their bytes are copied out of it
function floats(file) {
  return new Float32Array(Uint8Array.from(fs.readFileSync(file)).buffer);
}

async function main() {
  for (const file of fs.readdirSync(folder).filter((name) => name.endsWith(".onnx")).sort()) {
    const stem = path.join(folder, file.slice(0, -".onnx".length));
    const images = floats(stem + ".images");
    const wanted = floats(stem + ".logits");
    const session = await ort.InferenceSession.create(fs.readFileSync(path.join(folder, file)));
    let apart = 0;
    for (const size of [1, 8]) {
      const pixels = images.length / 8;
      const classes = wanted.length / 8;
      for (let first = 0; first < 8; first += size) {
        const part = images.slice(first * pixels, (first + size) * pixels);
        const feeds = { images: new ort.Tensor("float32", part, [size, 3, 12, 12]) };
        const { logits } = await session.run(feeds);
        for (let n = 0; n < logits.data.length; n++) {
          apart = Math.max(apart, Math.abs(logits.data[n] - wanted[first * classes + n]));
        }
      }
    }
    console.log(JSON.stringify({ name: path.basename(stem), apart }));
  }
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
