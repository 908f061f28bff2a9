//! One part of a tiny model or of its data damaged, everything else sound: a clear error, and
//! nothing left behind.

use super::bad_input::assert_clear_failure;
use super::tiny::{HIDDEN, Home, INTER, Spelling, Tensors, encode, write_json};
use super::{text, vlmq};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

/// Entries of a home beside what a run may leave: model and data.
const N_KEPT: usize = 2;

/// Changes the tensors of the model, quantizes it and expects an error with these parts.
fn with_tensors(spelling: Spelling, change: impl Fn(&mut Tensors), expected: &[&str]) {
    let home = Home::new(spelling);
    let mut tensors = spelling.tensors();
    change(&mut tensors);
    home.write_weights(&tensors, spelling.n_shards);
    let run = home.quantize(&["--bits", "3"]);
    assert_clear_failure(&run, expected, home.path(), N_KEPT);
}

/// Changes the files of model and data, quantizes, and expects an error with these parts.
fn with_files(change: impl Fn(&Home), expected: &[&str]) {
    let home = Home::new(Spelling::USUAL);
    change(&home);
    let run = home.quantize(&["--bits", "3"]);
    assert_clear_failure(&run, expected, home.path(), N_KEPT);
}

fn set_first(tensors: &mut Tensors, name: &str, value: f32) {
    let tensor = tensors.get_mut(name).unwrap();
    let bytes = encode(value, tensor.dtype);
    tensor.bytes[..bytes.len()].copy_from_slice(&bytes);
}

#[test]
fn one_number_that_is_none_in_any_tensor() {
    for (name, value) in [
        ("model.layers.0.self_attn.q_proj.weight", f32::NAN),
        ("model.layers.1.mlp.down_proj.weight", f32::INFINITY),
        ("model.layers.1.self_attn.v_proj.bias", f32::NEG_INFINITY),
        ("model.layers.0.input_layernorm.weight", f32::NAN),
        ("visual.patch_embed.proj.weight", f32::NAN),
        ("visual.blocks.0.attn.qkv.bias", f32::INFINITY),
        ("visual.merger.mlp.2.weight", f32::NAN),
        ("model.norm.weight", f32::INFINITY),
        ("model.embed_tokens.weight", f32::NAN),
    ] {
        let change = |tensors: &mut Tensors| set_first(tensors, name, value);
        with_tensors(
            Spelling::USUAL,
            change,
            &[name, "NaN or infinite", "weights"],
        );
    }
    for dtype in [Dtype::F16, Dtype::F32] {
        let name = "model.layers.1.mlp.gate_proj.weight";
        let change = |tensors: &mut Tensors| set_first(tensors, name, f32::NAN);
        let spelling = Spelling {
            dtype,
            ..Spelling::USUAL
        };
        with_tensors(spelling, change, &[name, "1 value(s)", "NaN or infinite"]);
    }
}

#[test]
fn a_weight_that_overflows_the_activations() {
    let huge = |tensors: &mut Tensors| {
        let tensor = tensors
            .get_mut("model.layers.0.mlp.up_proj.weight")
            .unwrap();
        let bytes = encode(3e38, tensor.dtype);
        tensor
            .bytes
            .chunks_exact_mut(2)
            .for_each(|v| v.copy_from_slice(&bytes));
    };
    with_tensors(Spelling::USUAL, huge, &["layers.0", "NaN or infinite"]);
}

#[test]
fn one_tensor_of_another_shape() {
    let (hidden, inter) = (HIDDEN.to_string(), INTER.to_string());
    for name in [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.embed_tokens.weight",
        "visual.patch_embed.proj.weight",
        "visual.merger.mlp.0.bias",
    ] {
        let cut = |tensors: &mut Tensors| {
            let tensor = tensors.get_mut(name).unwrap();
            tensor.bytes.truncate(tensor.bytes.len() / 2);
            tensor.shape[0] /= 2;
        };
        with_tensors(Spelling::USUAL, cut, &[name, "expected shape", "found"]);
    }
    let name = "model.layers.1.mlp.up_proj.weight";
    let turn = |tensors: &mut Tensors| tensors.get_mut(name).unwrap().shape.reverse();
    with_tensors(Spelling::USUAL, turn, &[name, &hidden, &inter]);
}

/// What is wrong with a late layer is told before the first one is begun.
#[test]
fn shapes_are_looked_at_before_any_work() {
    let home = Home::new(Spelling::USUAL);
    let mut tensors = Spelling::USUAL.tensors();
    let name = "model.layers.1.mlp.down_proj.weight";
    tensors.get_mut(name).unwrap().shape.reverse();
    home.write_weights(&tensors, 1);
    let run = home.quantize(&[]);
    assert_clear_failure(&run, &[name, "[64, 128]", "[128, 64]"], home.path(), N_KEPT);
    assert!(!text(&run.stderr).contains("layer 1 of"));
}

#[test]
fn one_tensor_that_is_absent_or_holds_no_floats() {
    for name in [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.input_layernorm.weight",
        "visual.patch_embed.proj.weight",
        "visual.blocks.0.norm2.bias",
    ] {
        let remove = |tensors: &mut Tensors| drop(tensors.remove(name).unwrap());
        with_tensors(Spelling::USUAL, remove, &[name, "missing"]);
    }
    let name = "model.layers.1.mlp.up_proj.weight";
    let retype = |tensors: &mut Tensors| tensors.get_mut(name).unwrap().dtype = Dtype::I16;
    with_tensors(Spelling::USUAL, retype, &[name, "BF16", "I16"]);
}

#[test]
fn an_index_that_does_not_fit_its_shards() {
    const INDEX: &str = "model.safetensors.index.json";
    let with_index = |change: &dyn Fn(&mut Value), expected: &[&str]| {
        let home = Home::new(Spelling {
            n_shards: 2,
            ..Spelling::USUAL
        });
        home.edit_json(INDEX, |index| change(index));
        let run = home.quantize(&["--bits", "3"]);
        assert_clear_failure(&run, expected, home.path(), N_KEPT);
    };
    let norm = "model.norm.weight";
    with_index(
        &|i| i["weight_map"][norm] = json!("../model.safetensors"),
        &[INDEX, "bare name"],
    );
    with_index(
        &|i| i["weight_map"][norm] = json!(3),
        &[INDEX, norm, "file name"],
    );
    with_index(
        &|i| i["weight_map"][norm] = json!("gone.safetensors"),
        &["gone.safetensors"],
    );
    with_index(
        &|i| i["weight_map"]["model.extra"] = json!(shard(1)),
        &[INDEX, "model.extra"],
    );
    with_index(
        &|i| drop(i["weight_map"].as_object_mut().unwrap().remove(norm)),
        &[INDEX, norm],
    );
    with_index(&|i| *i = json!([]), &[INDEX, "object"]);
    let home = Home::new(Spelling {
        n_shards: 2,
        ..Spelling::USUAL
    });
    std::fs::remove_file(home.model().join(shard(2))).unwrap();
    let run = home.quantize(&["--method", "rtn"]);
    assert_clear_failure(&run, &[&shard(2), "missing"], home.path(), N_KEPT);
}

fn shard(i: usize) -> String {
    format!("model-0000{i}-of-00002.safetensors")
}

/// Weights are finite, what the model makes of a picture is not: the module and the sample are named.
#[test]
fn activations_that_overflow_are_traced_to_their_sample() {
    let spelling = Spelling {
        dtype: Dtype::F32,
        ..Spelling::USUAL
    };
    let name = "visual.merger.mlp.2.weight";
    let overflow = |tensors: &mut Tensors| {
        let tensor = tensors.get_mut(name).unwrap();
        let huge = f32::MAX.to_le_bytes();
        tensor.bytes = huge.repeat(tensor.bytes.len() / huge.len());
    };
    let expected = [
        "model.layers.0.self_attn.q_proj",
        "NaN or infinite",
        "first in token",
        "samples.jsonl",
    ];
    with_tensors(spelling, overflow, &expected);
}

/// Address space that the matrix product reserves, little of which it ever touches: for each of three
/// threads and both float types, as many bytes as two third-level caches have.
fn reserved_kib() -> u64 {
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size");
    let size = size.unwrap_or_default();
    let kib = size.trim().strip_suffix('K').and_then(|n| n.parse().ok());
    3 * 2 * 2 * kib.unwrap_or(0)
}

/// Runs with little address space, so that a size that is believed before it is checked shows.
fn with_little_memory(args: &[&str]) -> Output {
    let kib = (3 << 20) + reserved_kib();
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -v {kib} && exec \"$@\""), "sh"]);
    command
        .arg(env!("CARGO_BIN_EXE_vlmq"))
        .args(args)
        .args(["--threads", "2"]);
    command.output().unwrap()
}

/// Whatever number stands in a configuration, a run ends with a result or with a clear error.
fn believe_no_number(file: &str, section: &str, keys: &[&str]) {
    let home = Home::new(Spelling::USUAL);
    let path = home.model().join(file);
    let sound: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let (model, data, output) = (home.model(), home.data(), home.output());
    let [model, data, output] = [&model, &data, &output].map(|p| p.to_str().unwrap());
    let common = [
        "quantize",
        model,
        "--calibration",
        data,
        "--output",
        output,
        "--samples",
        "1",
    ];
    for key in keys {
        for value in [
            json!(0),
            json!(1),
            json!(i32::MAX),
            json!(1e300),
            json!("many"),
            json!([]),
        ] {
            let mut config = sound.clone();
            *config.pointer_mut(&format!("{section}/{key}")).unwrap() = value.clone();
            write_json(&path, &config);
            for more in [
                &["--group-size", "-1"][..],
                &["--group-size", "-1", "--dry-run"],
            ] {
                let run = with_little_memory(&[&common[..], more].concat());
                let (code, stderr) = (run.status.code(), text(&run.stderr));
                let case = format!("{file} {key} = {value} {more:?}: {code:?} {stderr}");
                assert!(!stderr.contains("panicked"), "{case}");
                let is_whole = code == Some(0) && more.len() == 2;
                match code {
                    Some(0) => {}
                    Some(2) => assert!(stderr.contains("\nhint: "), "{case}"),
                    _ => panic!("{case}"),
                }
                let n = std::fs::read_dir(home.path()).unwrap().count();
                assert_eq!(n, N_KEPT + usize::from(is_whole), "{case}");
                if is_whole {
                    std::fs::remove_dir_all(output).unwrap();
                }
            }
        }
    }
}

#[test]
#[cfg(target_os = "linux")]
fn numbers_of_the_decoder_are_not_believed() {
    let keys = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "image_token_id",
        "rope_scaling/mrope_section/0",
    ];
    believe_no_number("config.json", "", &keys);
}

#[test]
#[cfg(target_os = "linux")]
fn numbers_of_the_tower_are_not_believed() {
    let keys = [
        "depth",
        "embed_dim",
        "num_heads",
        "mlp_ratio",
        "hidden_size",
        "in_channels",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
    ];
    believe_no_number("config.json", "/vision_config", &keys);
}

#[test]
#[cfg(target_os = "linux")]
fn numbers_of_the_processor_are_not_believed() {
    let keys = [
        "patch_size",
        "temporal_patch_size",
        "merge_size",
        "min_pixels",
        "max_pixels",
        "resample",
        "rescale_factor",
        "image_mean",
        "image_std/0",
    ];
    believe_no_number("preprocessor_config.json", "", &keys);
}

/// Each number within its bounds, but together more than a machine has.
#[test]
#[cfg(target_os = "linux")]
fn an_image_grown_beyond_measure() {
    let home = Home::new(Spelling::USUAL);
    home.edit_json("preprocessor_config.json", |p| {
        for key in ["patch_size", "merge_size", "temporal_patch_size"] {
            p[key] = json!(256);
        }
    });
    let (model, picture) = (home.model(), home.data().join("1.png"));
    let [model, picture] = [&model, &picture].map(|p| p.to_str().unwrap());
    let run = with_little_memory(&["generate", model, "--image", picture, "--prompt", "what?"]);
    assert_clear_failure(&run, &["pixels"], home.path(), N_KEPT);
}

#[test]
fn side_files_that_break_their_rules() {
    let write = |name: &'static str, content: &'static str| {
        move |home: &Home| std::fs::write(home.model().join(name), content).unwrap()
    };
    with_files(write("config.json", "not JSON"), &["config.json", "JSON"]);
    with_files(write("config.json", "[1, 2]"), &["config.json", "object"]);
    with_files(write("tokenizer.json", "{}"), &["tokenizer.json"]);
    with_files(
        write("tokenizer_config.json", "{\"a\": "),
        &["tokenizer_config.json"],
    );
    with_files(
        write("chat_template.jinja", "{% for m in %}"),
        &["chat_template.jinja"],
    );
    with_files(
        write("chat_template.jinja", "{{ messages | nosuch }}"),
        &["chat_template.jinja"],
    );
    with_files(
        write("chat_template.jinja", "no place for images"),
        &["chat_template.jinja"],
    );
    with_files(
        write("preprocessor_config.json", "{}"),
        &["preprocessor_config.json"],
    );
    with_files(
        write("generation_config.json", "{\"eos_token_id\": \"x\"}"),
        &["eos_token_id"],
    );
    for name in [
        "tokenizer.json",
        "preprocessor_config.json",
        "config.json",
        "model.safetensors",
    ] {
        with_files(
            |home| std::fs::remove_file(home.model().join(name)).unwrap(),
            &[name],
        );
    }
    let is_folder = |home: &Home| {
        std::fs::remove_file(home.model().join("model.safetensors")).unwrap();
        std::fs::create_dir(home.model().join("model.safetensors")).unwrap();
    };
    with_files(is_folder, &["model.safetensors"]);
}

#[test]
fn a_config_of_another_vocabulary() {
    let shorten = |tensors: &mut Tensors| {
        let table = tensors.get_mut("model.embed_tokens.weight").unwrap();
        table.shape[0] = 300;
        table.bytes.truncate(300 * HIDDEN * 2);
    };
    let home = Home::new(Spelling::USUAL);
    let mut tensors = Spelling::USUAL.tensors();
    shorten(&mut tensors);
    home.write_weights(&tensors, 1);
    home.edit_json("config.json", |c| c["vocab_size"] = json!(300));
    let run = home.quantize(&["--bits", "3"]);
    assert_clear_failure(&run, &["token id", "300"], home.path(), N_KEPT);
    with_files(
        |home| home.edit_json("config.json", |c| c["image_token_id"] = json!(5)),
        &["image tokens"],
    );
}

/// One sample whose image file has this content.
fn with_image(bytes: &[u8], expected: &[&str]) {
    with_files(
        |home| {
            for i in 0..6 {
                std::fs::write(home.data().join(format!("{i}.png")), bytes).unwrap();
            }
        },
        expected,
    );
}

#[test]
fn images_that_are_none() {
    let mut png = std::io::Cursor::new(Vec::new());
    let picture = image::RgbImage::from_pixel(30, 30, image::Rgb([9, 9, 9]));
    picture.write_to(&mut png, image::ImageFormat::Png).unwrap();
    let png = png.into_inner();
    with_image(b"", &[".png", "image"]);
    with_image(b"just some text", &[".png", "not an image"]);
    with_image(&png[..png.len() / 2], &[".png", "image data"]);
    // Width and height stand right after the first chunk's name.
    let mut bomb = png.clone();
    bomb[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
    with_image(&bomb, &[".png", "image data"]);
    let mut long = std::io::Cursor::new(Vec::new());
    let line = image::RgbImage::from_pixel(900, 2, image::Rgb([9, 9, 9]));
    line.write_to(&mut long, image::ImageFormat::Png).unwrap();
    with_image(&long.into_inner(), &["900", "aspect ratio"]);
}

#[test]
fn samples_that_contradict_themselves() {
    let with_sample = |sample: Value, expected: &[&str]| {
        let home = Home::new(Spelling::USUAL);
        std::fs::write(home.data().join("samples.jsonl"), format!("{sample}\n")).unwrap();
        let run = home.quantize(&["--samples", "1"]);
        assert_clear_failure(&run, expected, home.path(), N_KEPT);
    };
    let turn = |text: &str| json!([{"from": "human", "value": text}]);
    let place = "samples.jsonl: line 1";
    with_sample(json!([1, 2]), &["samples.jsonl"]);
    with_sample(json!({"image": "1.png"}), &["samples.jsonl"]);
    with_sample(
        json!({"image": "1.png", "conversations": 3}),
        &["samples.jsonl"],
    );
    with_sample(json!({"image": "1.png", "conversations": []}), &[place]);
    with_sample(
        json!({"image": 5, "conversations": turn("<image>")}),
        &[place, "image"],
    );
    let two_places = turn("<image><image> hm?");
    with_sample(
        json!({"image": "1.png", "conversations": two_places}),
        &[place, "1", "2"],
    );
    let web = json!({"image": "https://example.org/1.png", "conversations": turn("<image>")});
    with_sample(web, &["https://example.org/1.png", "not downloaded"]);
    let role = json!([{"from": "oracle", "value": "<image>"}]);
    with_sample(
        json!({"image": "1.png", "conversations": role}),
        &[place, "oracle"],
    );
    let placeholder = turn("<image> and <|image_pad|>");
    with_sample(
        json!({"image": "1.png", "conversations": placeholder}),
        &["<|image_pad|>"],
    );
}

#[test]
fn recipes_that_cannot_be() {
    let with_rules = |toml: &str, expected: &[&str]| {
        let home = Home::new(Spelling::USUAL);
        let rules = home.data().join("recipe.toml");
        std::fs::write(&rules, toml).unwrap();
        let run = home.quantize(&["--recipe", rules.to_str().unwrap()]);
        assert_clear_failure(&run, expected, home.path(), N_KEPT);
    };
    with_rules("[[rule]\n", &["recipe.toml"]);
    with_rules(
        "[[rule]]\npattern = '('\n",
        &["recipe.toml", "rule 0", "pattern"],
    );
    with_rules(
        "[[rule]]\npattern = 'a'\nbit = 3\n",
        &["recipe.toml", "bit"],
    );
    with_rules(
        "[[rule]]\npattern = 'a'\nbits = 7\n",
        &["recipe.toml", "rule 0", "7"],
    );
    with_rules("[[rule]]\npattern = ''\nskip = true\n", &["no module"]);
    with_rules(
        "[[rule]]\npattern = 'down'\ngroup_size = 48\n",
        &["48", "down_proj", "128"],
    );
    let home = Home::new(Spelling::USUAL);
    let run = home.quantize(&["--recipe", "nowhere.toml"]);
    assert_clear_failure(&run, &["nowhere.toml"], home.path(), N_KEPT);
}

#[test]
fn flags_that_contradict_the_method() {
    let with_flags = |flags: &[&str], expected: &[&str]| {
        let home = Home::new(Spelling::USUAL);
        let run = home.quantize(flags);
        assert_clear_failure(&run, expected, home.path(), N_KEPT);
    };
    with_flags(
        &["--group-size", "48"],
        &["--group-size 48", "q_proj", "13 modules more"],
    );
    with_flags(&["--group-size", "0"], &["--group-size", "multiple of 8"]);
    with_flags(&["--group-size", "-2"], &["--group-size", "-2"]);
    with_flags(&["--samples", "7"], &["--samples 7", "1 to 6"]);
    let set = ["--method", "gptq", "--set", "importance_power=2"];
    with_flags(&set, &["importance_power", "gptq"]);
    with_flags(&["--set", "alpha=NaN"], &["alpha=NaN", "0 to 1"]);
    with_flags(&["--set", "dampening_frac"], &["key=value"]);
    with_flags(&["--threads", "0"], &["--threads 0", "1 to 1024"]);
    with_flags(&["--threads", "100000"], &["--threads 100000", "1 to 1024"]);
    let home = Home::new(Spelling::USUAL);
    let mut command = vlmq();
    command
        .arg("quantize")
        .arg(home.model())
        .arg("--output")
        .arg(home.output());
    let run = command.args(["--group-size", "32"]).output().unwrap();
    assert_clear_failure(&run, &["--calibration", "vlmq"], home.path(), N_KEPT);
}

/// Questions and prompts: `eval` and `generate` fail as clearly as `quantize`.
#[test]
fn questions_that_cannot_be_answered() {
    let home = Home::new(Spelling::USUAL);
    let questions = home.questions();
    let eval = |more: &[&str], expected: &[&str]| {
        let mut command = vlmq();
        command
            .arg("eval")
            .arg(home.model())
            .arg("--task")
            .arg(&questions);
        let run = command.args(["--limit", "2"]).args(more).output().unwrap();
        assert_clear_failure(&run, expected, home.path(), N_KEPT);
    };
    let there = home.data();
    eval(&["--output", there.to_str().unwrap()], &["exists already"]);
    eval(&["--reference", "nowhere"], &["nowhere"]);
    std::fs::write(
        &questions,
        "{\"image\": \"1.png\", \"question\": \"what?\"}\n",
    )
    .unwrap();
    eval(&[], &["right answer", "questions.jsonl"]);
    std::fs::write(&questions, "").unwrap();
    eval(&[], &["empty", "questions.jsonl"]);
    let generate = |image: &Path, expected: &[&str]| {
        let mut command = vlmq();
        command
            .arg("generate")
            .arg(home.model())
            .arg("--image")
            .arg(image);
        let run = command.args(["--prompt", "what?"]).output().unwrap();
        assert_clear_failure(&run, expected, home.path(), N_KEPT);
    };
    generate(&home.data().join("gone.png"), &["gone.png"]);
    generate(&questions, &["questions.jsonl", "image"]);
    let run = vlmq().arg("inspect").arg(&questions).output().unwrap();
    assert_clear_failure(&run, &["questions.jsonl"], home.path(), N_KEPT);
    let reason = text(&run.stderr).matches("os error").count();
    assert_eq!(reason, 1, "one reason, told once: {}", text(&run.stderr));
}

/// A template that writes nothing leaves no token after which an answer could stand.
#[test]
fn a_prompt_without_a_token() {
    let home = Home::new(Spelling::USUAL);
    std::fs::write(home.model().join("chat_template.jinja"), "{# nothing #}").unwrap();
    let rows =
        "{\"question\": \"a?\", \"answer\": \"a\"}\n{\"question\": \"b?\", \"answer\": \"b\"}\n";
    std::fs::write(home.questions(), rows).unwrap();
    let mut command = vlmq();
    command
        .arg("eval")
        .arg(home.model())
        .arg("--task")
        .arg(home.questions());
    let run = command.output().unwrap();
    assert_clear_failure(&run, &["chat_template.jinja"], home.path(), N_KEPT);
}

/// A model of another vocabulary is no reference for this one.
#[test]
fn a_reference_of_another_size() {
    let (home, other) = (Home::new(Spelling::USUAL), Home::new(Spelling::USUAL));
    let mut tensors = Spelling::USUAL.tensors();
    let table = tensors.get_mut("model.embed_tokens.weight").unwrap();
    table.shape[0] -= 8;
    table.bytes.truncate(table.shape[0] * HIDDEN * 2);
    let vocab_size = table.shape[0];
    other.write_weights(&tensors, 1);
    other.edit_json("config.json", |c| c["vocab_size"] = json!(vocab_size));
    let mut command = vlmq();
    command
        .arg("eval")
        .arg(home.model())
        .arg("--task")
        .arg(home.questions());
    let run = command
        .arg("--reference")
        .arg(other.model())
        .output()
        .unwrap();
    assert_clear_failure(&run, &["reference", "expected shape"], home.path(), N_KEPT);
}
