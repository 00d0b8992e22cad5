// Exported files in transformers.js: the three masks of a point, written as JSON.
//
//     npm install @huggingface/transformers
//     node drop_in_transformers.mjs FOLDER DTYPE IMAGE X Y MASKS.json
//
// FOLDER is an absolute path to what `carsam export --profile transformers.js` wrote; DTYPE is fp32, q8 or q4.
import { SamModel, AutoProcessor, RawImage, Tensor, env } from '@huggingface/transformers';
import fs from 'fs';
env.allowRemoteModels = false; env.localModelPath = '/';
const [folder, dtype, image, x, y, out] = process.argv.slice(2);
const model = await SamModel.from_pretrained(folder, { dtype });
const processor = await AutoProcessor.from_pretrained(folder);
const photo = await RawImage.read(image);
const inputs = await processor(photo, { input_points: [[[Number(x), Number(y)]]], input_labels: [[1]] });
const outputs = await model(inputs);
const masks = await processor.post_process_masks(outputs.pred_masks, inputs.original_sizes, inputs.reshaped_input_sizes);
console.log(outputs.iou_scores.dims, Array.from(outputs.iou_scores.data), masks[0].dims);
fs.writeFileSync(out, JSON.stringify({ dims: masks[0].dims, data: Array.from(masks[0].data) }));
