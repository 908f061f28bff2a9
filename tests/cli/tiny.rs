//! A Qwen2-VL of a few hundred kilobytes with random weights, and data to go with it, in every
//! spelling that checkpoints have. What it answers is noise; where its files go is not.

use super::{repository, vlmq};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;

pub const HIDDEN: usize = 64;
pub const INTER: usize = 128;
pub const N_LAYERS: usize = 2;
/// Linears of the decoder.
pub const N_MODULES: usize = 7 * N_LAYERS;
const KV: usize = 32;
const VOCAB: usize = 448;
const TOWER: usize = 32;
const MERGED: usize = 4 * TOWER;
const SIDE_FILES: [&str; 3] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
];

/// One spelling of the same model.
#[derive(Clone, Copy)]
pub struct Spelling {
    pub dtype: Dtype,
    pub is_tied: bool,
    /// The names that transformers writes since 4.52.
    pub has_new_names: bool,
    pub n_shards: usize,
}

impl Spelling {
    /// What the hub has most: bf16, tied, the first names, one file.
    pub const USUAL: Self = Self {
        dtype: Dtype::BF16,
        is_tied: true,
        has_new_names: false,
        n_shards: 1,
    };

    /// Prefix of the decoder's names.
    pub fn decoder(self) -> &'static str {
        match self.has_new_names {
            true => "model.language_model",
            false => "model",
        }
    }

    fn tower(self) -> &'static str {
        match self.has_new_names {
            true => "model.visual",
            false => "visual",
        }
    }

    fn shapes(self) -> Vec<(String, Vec<usize>)> {
        let (decoder, tower) = (self.decoder(), self.tower());
        let mut all = vec![
            (
                format!("{decoder}.embed_tokens.weight"),
                vec![VOCAB, HIDDEN],
            ),
            (format!("{decoder}.norm.weight"), vec![HIDDEN]),
            (
                format!("{tower}.patch_embed.proj.weight"),
                vec![TOWER, 3, 2, 14, 14],
            ),
            (format!("{tower}.merger.ln_q.weight"), vec![TOWER]),
            (format!("{tower}.merger.ln_q.bias"), vec![TOWER]),
        ];
        if !self.is_tied {
            all.push(("lm_head.weight".into(), vec![VOCAB, HIDDEN]));
        }
        for i in 0..N_LAYERS {
            let layer = format!("{decoder}.layers.{i}");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                all.push((format!("{layer}.{norm}.weight"), vec![HIDDEN]));
            }
            for (name, out, inp, has_bias) in [
                ("self_attn.q_proj", HIDDEN, HIDDEN, true),
                ("self_attn.k_proj", KV, HIDDEN, true),
                ("self_attn.v_proj", KV, HIDDEN, true),
                ("self_attn.o_proj", HIDDEN, HIDDEN, false),
                ("mlp.gate_proj", INTER, HIDDEN, false),
                ("mlp.up_proj", INTER, HIDDEN, false),
                ("mlp.down_proj", HIDDEN, INTER, false),
            ] {
                all.extend(linear(&format!("{layer}.{name}"), out, inp, has_bias));
            }
        }
        for (name, out, inp) in [
            ("blocks.0.attn.qkv", 3 * TOWER, TOWER),
            ("blocks.0.attn.proj", TOWER, TOWER),
            ("blocks.0.mlp.fc1", 4 * TOWER, TOWER),
            ("blocks.0.mlp.fc2", TOWER, 4 * TOWER),
            ("merger.mlp.0", MERGED, MERGED),
            ("merger.mlp.2", HIDDEN, MERGED),
        ] {
            all.extend(linear(&format!("{tower}.{name}"), out, inp, true));
        }
        for norm in ["norm1", "norm2"] {
            for part in ["weight", "bias"] {
                all.push((format!("{tower}.blocks.0.{norm}.{part}"), vec![TOWER]));
            }
        }
        all
    }

    /// The tensors of the model, always the same values.
    pub fn tensors(self) -> Tensors {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let shapes = self.shapes().into_iter();
        shapes
            .map(|(name, shape)| {
                let n: usize = shape.iter().product();
                let inputs: usize = shape[1..].iter().product();
                let is_norm = shape.len() == 1 && name.ends_with("weight");
                let (middle, width) = match is_norm {
                    true => (1.0, 0.3),
                    false => (0.0, 1.4 / (inputs as f32).sqrt()),
                };
                let values = (0..n).map(|_| middle + width * rng.random_range(-1.0f32..1.0));
                let bytes = values.flat_map(|v| encode(v, self.dtype)).collect();
                (
                    name,
                    Stored {
                        dtype: self.dtype,
                        shape,
                        bytes,
                    },
                )
            })
            .collect()
    }

    fn config(self, tokens: &BTreeMap<String, u64>) -> Value {
        json!({
            "model_type": "qwen2_vl",
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INTER,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": self.is_tied,
            "image_token_id": tokens["<|image_pad|>"],
            "vision_config": {
                "depth": 1, "embed_dim": TOWER, "num_heads": 2, "mlp_ratio": 4,
                "hidden_size": HIDDEN, "in_channels": 3, "patch_size": 14,
                "temporal_patch_size": 2, "spatial_merge_size": 2,
            },
        })
    }
}

/// A tensor as it lies in a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Stored>;

fn linear(name: &str, out: usize, inp: usize, has_bias: bool) -> Vec<(String, Vec<usize>)> {
    let mut parts = vec![(format!("{name}.weight"), vec![out, inp])];
    if has_bias {
        parts.push((format!("{name}.bias"), vec![out]));
    }
    parts
}

/// The bytes of a value in a float type.
pub fn encode(value: f32, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::F32 => value.to_le_bytes().to_vec(),
        other => panic!("the tests write no {other:?}"),
    }
}

/// Writes one safetensors file.
pub fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, t)| {
        let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap();
        (name.clone(), view)
    });
    serialize_to_file(views, None, path).unwrap();
}

/// All tensors of a folder.
pub fn read_tensors(folder: &Path) -> Tensors {
    let mut all = Tensors::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let file = std::fs::read(&path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        for (name, view) in tensors.iter() {
            let (dtype, shape) = (view.dtype(), view.shape().to_vec());
            let bytes = view.data().to_vec();
            all.insert(
                name.to_owned(),
                Stored {
                    dtype,
                    shape,
                    bytes,
                },
            );
        }
    }
    all
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A folder with a tiny model, samples and questions in it, gone when dropped.
pub struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    pub fn new(spelling: Spelling) -> Self {
        let home = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        home.write_model(spelling);
        home.write_data();
        home
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn model(&self) -> PathBuf {
        self.path().join("model")
    }

    /// A folder of samples, the first with two images.
    pub fn data(&self) -> PathBuf {
        self.path().join("data")
    }

    /// A file of questions.
    pub fn questions(&self) -> PathBuf {
        self.data().join("questions.jsonl")
    }

    pub fn output(&self) -> PathBuf {
        self.path().join("out")
    }

    fn write_model(&self, spelling: Spelling) {
        let model = self.model();
        std::fs::create_dir(&model).unwrap();
        let source = repository("testdata/processor/model");
        for name in SIDE_FILES {
            std::fs::copy(source.join(name), model.join(name)).unwrap();
        }
        let mut processor = read_json(&source.join("preprocessor_config.json"));
        processor["min_pixels"] = json!(56 * 56);
        processor["max_pixels"] = json!(84 * 84);
        write_json(&model.join("preprocessor_config.json"), &processor);
        let added = read_json(&source.join("tokenizer.json"))["added_tokens"].take();
        let tokens = added.as_array().unwrap().iter();
        let tokens = tokens
            .map(|t| {
                (
                    t["content"].as_str().unwrap().to_owned(),
                    t["id"].as_u64().unwrap(),
                )
            })
            .collect();
        write_json(&model.join("config.json"), &spelling.config(&tokens));
        self.write_weights(&spelling.tensors(), spelling.n_shards);
    }

    /// Deals the tensors to files, one after the other, and writes an index if they are several.
    pub fn write_weights(&self, tensors: &Tensors, n_shards: usize) {
        let model = self.model();
        if n_shards == 1 {
            return write_tensors(&model.join("model.safetensors"), tensors);
        }
        let mut shards = vec![Tensors::new(); n_shards];
        let mut weight_map = serde_json::Map::new();
        for (i, (name, tensor)) in tensors.iter().enumerate() {
            shards[i % n_shards].insert(name.clone(), tensor.clone());
            weight_map.insert(name.clone(), json!(shard_name(i % n_shards, n_shards)));
        }
        for (i, shard) in shards.iter().enumerate() {
            write_tensors(&model.join(shard_name(i, n_shards)), shard);
        }
        let index = json!({"metadata": {}, "weight_map": weight_map});
        write_json(&model.join("model.safetensors.index.json"), &index);
    }

    fn write_data(&self) {
        let data = self.data();
        std::fs::create_dir(&data).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let (mut samples, mut questions) = (String::new(), String::new());
        for i in 0..6u32 {
            let name = format!("{i}.png");
            image::RgbImage::from_fn(50 + 9 * i, 70, |_, _| image::Rgb(rng.random()))
                .save(data.join(&name))
                .unwrap();
            let (place, images) = match i {
                0 => ("<image><image>", json!([name, name])),
                _ => ("<image>", json!(name)),
            };
            let turn = |from: &str, value: String| json!({"from": from, "value": value});
            let turns = [
                turn("human", format!("{place}\nhow many?")),
                turn("gpt", format!("there are {i} of them")),
                turn("human", "sure?".into()),
                turn("gpt", "yes".into()),
            ];
            samples += &format!(
                "{}\n",
                json!({"id": i, "image": images, "conversations": turns})
            );
            questions += &format!(
                "{}\n",
                json!({"image": name, "question": "how many?", "answer": i.to_string()})
            );
        }
        std::fs::write(data.join("samples.jsonl"), samples).unwrap();
        std::fs::write(self.questions(), questions).unwrap();
    }

    /// Changes a JSON file of the model.
    pub fn edit_json(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let path = self.model().join(name);
        let mut value = read_json(&path);
        change(&mut value);
        write_json(&path, &value);
    }

    /// `vlmq quantize` of the tiny model into [`Home::output`], groups of 32 unless told.
    pub fn quantize(&self, more: &[&str]) -> Output {
        self.quantize_to(&self.output(), more)
    }

    pub fn quantize_to(&self, output: &Path, more: &[&str]) -> Output {
        let mut command = vlmq();
        command
            .arg("quantize")
            .arg(self.model())
            .arg("--output")
            .arg(output);
        command.arg("--calibration").arg(self.data());
        for (flag, value) in [("--samples", "4"), ("--group-size", "32")] {
            if !more.contains(&flag) {
                command.args([flag, value]);
            }
        }
        command.args(more).output().unwrap()
    }
}

pub fn write_json(path: &Path, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

fn shard_name(i: usize, n: usize) -> String {
    format!("model-{:05}-of-{n:05}.safetensors", i + 1)
}
