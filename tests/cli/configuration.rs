//! `vlmq verify` on folders whose configuration or files were changed by hand: each change is told
//! by its key or name, and folders that nobody touched are clean.

use super::exports::{export, home};
use super::{json, model_copy, quantize, repository, text, vlmq};
use serde_json::{Value, json as value};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// What is wrong with a folder, beside `against`, if anything.
fn problems(folder: &Path, against: Option<&Path>) -> Vec<String> {
    let mut command = vlmq();
    command.arg("verify").arg(folder).arg("--json");
    if let Some(source) = against {
        command.arg("--against").arg(source);
    }
    let done = command.output().unwrap();
    let found = json(&done.stdout)["verification"]["problems"].take();
    let found: Vec<String> = serde_json::from_value(found).unwrap();
    let expected = i32::from(!found.is_empty());
    assert_eq!(done.status.code(), Some(expected), "{}", text(&done.stderr));
    found
}

/// A folder to be damaged, with the model that it is made of.
struct Folder {
    _home: TempDir,
    path: PathBuf,
    source: PathBuf,
}

impl Folder {
    /// The bundled model in this format, with nothing wrong.
    fn new(format: &str, scheme: &[&str]) -> Self {
        let (home, first) = home(scheme);
        let path = match format {
            "compressed-tensors" => first,
            _ => home.path().join("folder"),
        };
        if format != "compressed-tensors" {
            let done = export(&home.path().join("quantized"), format, &path, &[]);
            assert!(done.status.success(), "{}", text(&done.stderr));
        }
        let source = repository("testbed/model");
        let _home = home;
        let folder = Self {
            _home,
            path,
            source,
        };
        assert!(folder.problems().is_empty(), "{:?}", folder.problems());
        folder
    }

    /// As of another tool: what tells that vlmq wrote it is gone.
    fn of_another_tool(format: &str, scheme: &[&str]) -> Self {
        let folder = Self::new(format, scheme);
        for file in ["vlmq_report.json", "README.md"] {
            std::fs::remove_file(folder.path.join(file)).unwrap();
        }
        assert!(folder.problems().is_empty(), "{:?}", folder.problems());
        folder
    }

    fn problems(&self) -> Vec<String> {
        problems(&self.path, Some(&self.source))
    }

    /// Whether a change of `config.json` is told, alone and beside the source, by these words.
    fn tells(&self, edit: impl Fn(&mut Value), expected: &str) {
        let path = self.path.join("config.json");
        let before = std::fs::read_to_string(&path).unwrap();
        let mut config: Value = serde_json::from_str(&before).unwrap();
        edit(&mut config);
        std::fs::write(&path, config.to_string()).unwrap();
        for against in [None, Some(&*self.source)] {
            let found = problems(&self.path, against);
            let is_told = found.iter().any(|problem| problem.contains(expected));
            assert!(is_told, "{expected:?} in {found:#?}");
        }
        std::fs::write(&path, before).unwrap();
    }

    /// The same for one key of what it says of the quantization.
    fn tells_key(&self, pointer: &str, new: Value, expected: &str) {
        let edit = |config: &mut Value| {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            let parent = config.pointer_mut(parent).unwrap();
            parent[key] = new.clone();
        };
        self.tells(edit, expected);
    }
}

#[test]
fn every_key_of_gptq_is_known() {
    let v2 = Folder::new("gptq", &["--bits", "4"]);
    let common = "/quantization_config";
    for (key, new, expected) in [
        ("bits", value!(8), "config.bits: expected 4, found 8"),
        (
            "group_size",
            value!(32),
            "group_size: expected 64, found 32",
        ),
        (
            "sym",
            value!(true),
            "config.sym: expected false, found true",
        ),
        (
            "checkpoint_format",
            value!("gptq"),
            "checkpoint_format: expected \"gptq_v2\", found \"gptq\"",
        ),
        ("desc_act", value!(true), "desc_act: expected false"),
        ("lm_head", value!(true), "lm_head: expected false"),
        ("dynamic", value!({}), "dynamic.-:.*visual.*: expected {}"),
        (
            "block_name_to_quantize",
            value!("model.layers"),
            "block_name_to_quantize: expected \"model.language_model.layers\"",
        ),
        ("more", value!(1), "config.more: not expected, found 1"),
    ] {
        v2.tells_key(&format!("{common}/{key}"), new, expected);
    }
    let rule = "+:.*layers\\.0\\.mlp\\.up_proj$";
    v2.tells(
        |config| config["quantization_config"]["dynamic"][rule] = value!({"bits": 8}),
        "up_proj$: not expected, found {\"bits\":8}",
    );
    let v1 = Folder::new("gptq", &["--bits", "3", "--symmetric"]);
    v1.tells_key(
        "/quantization_config/sym",
        value!(false),
        "sym: expected true",
    );
    v1.tells_key(
        "/quantization_config/checkpoint_format",
        value!("gptq_v2"),
        "checkpoint_format: expected \"gptq\"",
    );
    let second = v1.path.join("quantize_config.json");
    let before = std::fs::read(&second).unwrap();
    std::fs::remove_file(&second).unwrap();
    assert_eq!(
        v1.problems(),
        ["quantize_config.json: is not there, and some readers ask for it"]
    );
    std::fs::write(&second, before).unwrap();
    assert!(v1.problems().is_empty());
}

#[test]
fn every_key_of_compressed_tensors_is_known() {
    for (symmetry, other) in [("--asymmetric", true), ("--symmetric", false)] {
        let folder = Folder::new("compressed-tensors", &["--bits", "3", symmetry]);
        let group = "/quantization_config/config_groups/group_0";
        for (key, new, expected) in [
            (
                "targets",
                value!(["Nothing"]),
                "targets: expected [\"Linear\"]",
            ),
            (
                "weights/actorder",
                value!("group"),
                "actorder: expected null",
            ),
            (
                "weights/num_bits",
                value!(4),
                "num_bits: expected 3, found 4",
            ),
            ("weights/group_size", value!(32), "group_size: expected 64"),
            (
                "weights/symmetric",
                value!(other),
                "weights.symmetric: expected",
            ),
            ("weights/strategy", value!("channel"), "strategy: expected"),
        ] {
            folder.tells_key(&format!("{group}/{key}"), new, expected);
        }
        folder.tells_key(
            "/quantization_config/ignore",
            value!([]),
            "config.ignore: expected [\"lm_head\"",
        );
    }
}

#[test]
fn every_key_of_awq_and_mlx_is_known() {
    let awq = Folder::new("awq", &["--bits", "4"]);
    let left_out = "/quantization_config/modules_to_not_convert";
    awq.tells_key(left_out, value!([]), "modules_to_not_convert: expected [");
    awq.tells(
        |config| {
            let object = config["quantization_config"].as_object_mut().unwrap();
            object.remove("modules_to_not_convert").unwrap();
        },
        "is not there",
    );
    let zero_point = "/quantization_config/zero_point";
    awq.tells_key(zero_point, value!(false), "zero_point: expected true");
    awq.tells_key("/quantization_config/group_size", value!(32), "group_size");
    let mlx = Folder::new("mlx", &["--bits", "3"]);
    let absent = "/quantization/model.layers.9.mlp.up_proj";
    let entry = value!({"bits": 4, "group_size": 64, "mode": "affine"});
    mlx.tells_key(absent, entry, "layers.9.mlp.up_proj: not expected");
    mlx.tells_key("/quantization/bits", value!(4), "bits");
    mlx.tells_key("/quantization/group_size", value!(32), "up_proj");
}

/// Formats whose readers know more than one for a folder.
#[test]
fn mixed_bits_are_held_against_their_rules() {
    for (format, pointer, new, expected) in [
        (
            "compressed-tensors",
            "/quantization_config/config_groups/group_1/targets",
            value!(["re:.*nowhere$"]),
            "group_1.targets: expected [\"re:.*layers\\\\.0",
        ),
        (
            "gptq",
            "/quantization_config/dynamic",
            value!({}),
            "dynamic.+:",
        ),
        (
            "mlx",
            "/quantization/model.layers.0.mlp.down_proj",
            value!({"bits": 4, "group_size": 64, "mode": "affine"}),
            "model.layers.0.mlp.down_proj",
        ),
    ] {
        let recipes = tempfile::tempdir().unwrap();
        let recipe = recipes.path().join("recipe.toml");
        let rule =
            "[[rule]]\npattern = 'layers\\.0\\.mlp\\.down_proj'\nbits = 8\nsymmetric = true\n";
        std::fs::write(&recipe, rule).unwrap();
        let recipe = recipe.to_str().unwrap();
        let folder = Folder::new(format, &["--bits", "4", "--recipe", recipe]);
        folder.tells_key(pointer, new, expected);
    }
}

/// Of folders that another tool wrote each module's format is looked up as readers do.
#[test]
fn the_formats_of_another_tools_folder_are_held_against_its_tensors() {
    let gptq = Folder::of_another_tool("gptq", &["--bits", "4", "--symmetric"]);
    let of_all = "27 others: ";
    for (key, new, expected) in [
        ("bits", value!(8), "bits: its tensors are of 4, found 8"),
        (
            "group_size",
            value!(32),
            "group_size: its tensors are of 64",
        ),
        (
            "checkpoint_format",
            value!("gptq_v2"),
            "checkpoint_format: ",
        ),
    ] {
        let expected = format!("{of_all}{expected}");
        gptq.tells_key(&format!("/quantization_config/{key}"), new, &expected);
    }
    let lm_head = "/quantization_config/lm_head";
    gptq.tells_key(lm_head, value!(true), "lm_head: expected false");
    let rule = "+:.*layers\\.0\\.mlp\\.up_proj$";
    gptq.tells(
        |config| config["quantization_config"]["dynamic"][rule] = value!({"bits": 8}),
        "model.layers.0.mlp.up_proj: bits: its tensors are of 4, found 8",
    );
    let v2 = Folder::of_another_tool("gptq", &["--bits", "4"]);
    let sym = "/quantization_config/sym";
    v2.tells_key(
        sym,
        value!(true),
        "symmetric: its tensors are of an asymmetric",
    );
}

/// The same of the two formats whose tensors say less.
#[test]
fn targets_and_zero_points_of_another_tools_folder_are_held_against_its_tensors() {
    let folder = Folder::of_another_tool("compressed-tensors", &["--bits", "4"]);
    let group = "/quantization_config/config_groups/group_0";
    for (key, new, expected) in [
        (
            "targets",
            value!(["Nothing"]),
            "27 others: config_groups: no target",
        ),
        (
            "weights/actorder",
            value!("group"),
            "there is no weight_g_idx",
        ),
        (
            "weights/symmetric",
            value!(true),
            "27 others: symmetric: its",
        ),
    ] {
        folder.tells_key(&format!("{group}/{key}"), new, expected);
    }
    let ignore = "/quantization_config/ignore";
    let forgotten = "visual.blocks.0.attn.qkv: is not quantized, and config.json does not";
    folder.tells_key(ignore, value!([]), forgotten);
    let awq = Folder::of_another_tool("awq", &["--bits", "4"]);
    let zero_point = "/quantization_config/zero_point";
    awq.tells_key(zero_point, value!(false), "zero_point: expected true");
}

/// The rest of the configuration and all files beside it, in folders of every format.
#[test]
fn what_is_beside_the_weights_is_the_sources() {
    for format in ["compressed-tensors", "gptq", "awq", "mlx", "bf16", "gguf"] {
        let folder = Folder::new(format, &["--bits", "4"]);
        let told = |file: &str, change: &dyn Fn(&Path), expected: &str| {
            let path = folder.path.join(file);
            let before = std::fs::read(&path).unwrap();
            change(&path);
            let found = folder.problems();
            let is_told = found.iter().any(|problem| problem.contains(expected));
            assert!(is_told, "{format}: {expected:?} in {found:#?}");
            std::fs::write(&path, before).unwrap();
        };
        let replaced = |path: &Path, a: &str, b: &str| {
            let before = std::fs::read_to_string(path).unwrap();
            let after = before.replacen(a, b, 1);
            assert_ne!(before, after);
            std::fs::write(path, after).unwrap();
        };
        told(
            "config.json",
            &|path| replaced(path, "\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 0.1"),
            "config.json: rms_norm_eps: expected 1e-6, found 0.1",
        );
        let changed = "tokenizer_config.json: its bytes are not those";
        told(
            "tokenizer_config.json",
            &|path| replaced(path, "}", " }"),
            changed,
        );
        let remove = |path: &Path| std::fs::remove_file(path).unwrap();
        let gone = "generation_config.json: is beside the source's weights and not here";
        told("generation_config.json", &remove, gone);
        assert!(folder.problems().is_empty(), "{format}");
    }
    let folder = Folder::of_another_tool("gptq", &["--bits", "4"]);
    let path = folder.path.join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let config = config.replace("\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 0.1");
    std::fs::write(&path, config).unwrap();
    let told = folder.problems();
    assert!(told[0].contains("rms_norm_eps: expected 1e-6"), "{told:?}");
}

/// Keys of GGUF files.
#[test]
fn every_key_of_gguf_is_held_against_the_source() {
    let folder = Folder::new("gguf", &["--bits", "4"]);
    for (file, key, expected) in [
        (
            "model-Q4_1.gguf",
            "qwen2vl.attention.layer_norm_rms_epsilon",
            "model: qwen2vl.attention.layer_norm_rms_epsilon: expected F32(",
        ),
        (
            "mmproj-BF16.gguf",
            "clip.vision.attention.layer_norm_epsilon",
            "mmproj: clip.vision.attention.layer_norm_epsilon: expected F32(",
        ),
    ] {
        let path = folder.path.join(file);
        let before = std::fs::read(&path).unwrap();
        let mut bytes = before.clone();
        let places = bytes.windows(key.len()).position(|w| w == key.as_bytes());
        // The key's type, four bytes, and then its value.
        let at = places.unwrap() + key.len() + 4;
        bytes[at..at + 4].copy_from_slice(&0.5f32.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let found = folder.problems();
        let is_told = found.iter().any(|problem| problem.starts_with(expected));
        assert!(is_told, "{expected:?} in {found:#?}");
        std::fs::write(&path, before).unwrap();
    }
    assert!(folder.problems().is_empty());
}

/// Remote code, processors and templates, in subfolders too.
#[test]
fn subfolders_of_the_source_come_along() {
    let home = tempfile::tempdir().unwrap();
    let source = model_copy(home.path());
    let files = [
        ("modeling_of_my_own.py", "from .package.inner import code\n"),
        ("processor_config.json", "{\"image_seq_len\": 64}\n"),
        ("package/__init__.py", ""),
        ("package/inner/code.py", "ONE = 1\n"),
        ("additional_chat_templates/tool_use.jinja", "{{ tools }}\n"),
    ];
    let not_copied = ["package/weights.bin", ".cache/lock", "onnx/model.onnx"];
    for (name, content) in files.into_iter().chain(not_copied.map(|name| (name, "x"))) {
        let path = source.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    let first = home.path().join("quantized");
    let made = quantize(&source, &first, &["--method", "rtn", "--bits", "4"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    for format in ["compressed-tensors", "gptq", "gguf", "bf16"] {
        let folder = match format {
            "compressed-tensors" => first.clone(),
            _ => home.path().join(format),
        };
        if folder != first {
            let done = export(&first, format, &folder, &[]);
            assert!(done.status.success(), "{}", text(&done.stderr));
        }
        for (name, content) in files {
            let found = std::fs::read_to_string(folder.join(name)).unwrap();
            assert_eq!(found, content, "{format}: {name}");
        }
        for name in not_copied {
            assert!(!folder.join(name).exists(), "{format}: {name}");
        }
        assert_eq!(problems(&folder, Some(&source)), [""; 0], "{format}");
        std::fs::write(folder.join("package/inner/code.py"), "ONE = 2\n").unwrap();
        std::fs::remove_file(folder.join("additional_chat_templates/tool_use.jinja")).unwrap();
        let told = problems(&folder, Some(&source)).join("\n");
        for expected in [
            "package/inner/code.py: its bytes",
            "additional_chat_templates/tool_use.jinja: is beside",
        ] {
            assert!(told.contains(expected), "{format}: {told}");
        }
        std::fs::write(folder.join("package/inner/code.py"), "ONE = 1\n").unwrap();
        let template = "additional_chat_templates/tool_use.jinja";
        std::fs::copy(source.join(template), folder.join(template)).unwrap();
    }
}

/// A link among the source's files ends a run before it begins.
#[test]
#[cfg(unix)]
fn a_link_to_a_folder_is_refused_before_any_work() {
    let home = tempfile::tempdir().unwrap();
    let source = model_copy(home.path());
    std::os::unix::fs::symlink(repository("testbed"), source.join("more")).unwrap();
    let output = home.path().join("quantized");
    let made = quantize(&source, &output, &["--method", "rtn", "--bits", "4"]);
    assert_eq!(made.status.code(), Some(2));
    let told = text(&made.stderr);
    assert!(told.contains("more: links to a folder"), "{told}");
    assert!(!output.exists());
}

/// Columns whose groups are in an order of their own would be read as other weights.
#[test]
fn columns_in_groups_of_another_order_are_refused() {
    use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
    let folder = Folder::of_another_tool("compressed-tensors", &["--bits", "4"]);
    let path = folder.path.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let groups: Vec<u8> = (0..256i32).flat_map(|i| (i % 4).to_le_bytes()).collect();
    let added = TensorView::new(Dtype::I32, vec![256], &groups).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight_g_idx".to_owned();
    let all = tensors.iter().map(|(name, view)| (name.to_owned(), view));
    serialize_to_file(all.chain([(name, added)]), None, &path).unwrap();
    let mut command = vlmq();
    command
        .arg("export")
        .arg(&folder.path)
        .args(["--format", "bf16", "--output"]);
    let done = command
        .arg(folder.path.with_file_name("out"))
        .output()
        .unwrap();
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(2), "{said}");
    assert!(
        said.contains("q_proj: columns in groups of their own order"),
        "{said}"
    );
}
