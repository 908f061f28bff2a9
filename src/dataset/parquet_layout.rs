//! What a parquet file says of its own layout, held against its size before the parquet crate
//! believes it.
//!
//! That crate sets aside memory for as many columns as a schema claims, follows schemas by
//! recursion, and hands out as many rows as are announced, all of which ends the process and not
//! the reading when it is a lie. Run lengths and dictionaries let a small file tell the truth about
//! a vast number of values, so these are bounded by the size of the file.
//!
//! Source: the Thrift compact protocol; parquet-format `parquet.thrift`.

use crate::{Error, Result};
use parquet::file::metadata::ParquetMetaData;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, copy, sink};
use std::path::Path;

/// Structs in lists in structs, and columns in columns.
const MAX_DEPTH: usize = 64;
/// Values of any file, and values for each byte of it: twenty constant columns beside one short
/// text a row stay far below.
const MIN_VALUES: u64 = 1 << 16;
const VALUES_PER_BYTE: u64 = 16;
/// Bytes of one page unpacked, and bytes for each packed one.
const MIN_PAGE_BYTES: u64 = 64 << 20;
const PAGE_BYTES_PER_BYTE: u64 = 64;

/// Magic and length at the end of every file.
const TAIL_BYTES: u64 = 8;

/// Looks at the schema in the footer. A file without a footer is left to the parquet crate.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] if it is damaged, deeper than 64 levels, or has fewer columns
/// than it claims.
pub(super) fn check_schema(path: &Path, file: &mut File) -> Result<()> {
    let fail = |e| Error::io(path, "read", e);
    let n_bytes = file.metadata().map_err(fail)?.len();
    let Some(end) = n_bytes.checked_sub(TAIL_BYTES) else {
        return Ok(());
    };
    let mut tail = [0; 4];
    file.seek(SeekFrom::Start(end)).map_err(fail)?;
    file.read_exact(&mut tail).map_err(fail)?;
    let n_footer = u64::from(u32::from_le_bytes(tail));
    let Some(start) = end.checked_sub(n_footer) else {
        return Ok(());
    };
    file.seek(SeekFrom::Start(start)).map_err(fail)?;
    match Thrift::new(BufReader::new(file), n_footer).schema_is_sound() {
        Some(true) => Ok(()),
        _ => Err(Error::format(path, "footer", "damaged schema")),
    }
}

/// Looks at the headers of all pages.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for a damaged one, a page that unpacks to far more than it is,
/// and values or rows beyond what a file of this size can have.
pub(super) fn check_pages(path: &Path, file: &File, metadata: &ParquetMetaData) -> Result<()> {
    let fail = |e| Error::io(path, "read", e);
    let n_bytes = file.metadata().map_err(fail)?.len();
    let mut left = n_bytes.saturating_mul(VALUES_PER_BYTE).max(MIN_VALUES);
    let mut reader = BufReader::new(file);
    for (i, group) in metadata.row_groups().iter().enumerate() {
        let bad = |why: &str| Error::format(path, format!("row group {}", i + 1), why);
        if group.num_rows() != 0 && group.columns().is_empty() {
            return Err(bad("rows announced, but no columns"));
        }
        for column in group.columns() {
            let (start, n_bytes) = column.byte_range();
            reader.seek(SeekFrom::Start(start)).map_err(fail)?;
            let n_values = Thrift::new(&mut reader, n_bytes).n_values();
            let n_values = n_values.ok_or_else(|| bad("damaged page header"))?;
            if group.num_rows() as u64 > n_values {
                return Err(bad("more rows announced than there are values"));
            }
            left = left
                .checked_sub(n_values)
                .ok_or_else(|| bad("far more values than the size of the file allows for"))?;
        }
    }
    Ok(())
}

/// Kinds of Thrift values that are told apart here.
const STOP: u8 = 0;
const I32: u8 = 5;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// A reader of Thrift's compact encoding; `None` is damage throughout.
struct Thrift<R> {
    input: R,
    /// Bytes until the end.
    left: u64,
}

impl<R: Read> Thrift<R> {
    fn new(input: R, left: u64) -> Self {
        Self { input, left }
    }

    /// Whether each column of `FileMetaData.schema` has the columns inside it that it claims.
    fn schema_is_sound(mut self) -> Option<bool> {
        let mut is_sound = true;
        self.fields(MAX_DEPTH, |thrift, id, kind| {
            if (id, kind) != (2, LIST) {
                return thrift.skip(kind, MAX_DEPTH);
            }
            let (kind, n) = thrift.list()?;
            let mut n_children = Vec::new();
            for _ in 0..n {
                n_children.push(thrift.n_children(kind)?);
            }
            is_sound &= is_tree(&n_children);
            Some(())
        })?;
        Some(is_sound)
    }

    /// `SchemaElement.num_children`.
    fn n_children(&mut self, kind: u8) -> Option<u64> {
        let mut n_children = 0;
        if kind != STRUCT {
            return None;
        }
        self.fields(MAX_DEPTH, |thrift, id, kind| match (id, kind) {
            (5, I32) => {
                n_children = u64::try_from(thrift.i32()?).ok()?;
                Some(())
            }
            _ => thrift.skip(kind, MAX_DEPTH),
        })?;
        Some(n_children)
    }

    /// Values, nulls included, of all pages of a column, its dictionary too.
    fn n_values(mut self) -> Option<u64> {
        let mut n_values = 0u64;
        while self.left > 0 {
            let page = self.page_header()?;
            let most = page.n_packed.saturating_mul(PAGE_BYTES_PER_BYTE);
            if page.n_unpacked > most.max(MIN_PAGE_BYTES) {
                return None;
            }
            n_values = n_values.checked_add(page.n_values)?;
            self.skip_bytes(page.n_packed)?;
        }
        Some(n_values)
    }

    /// A `PageHeader`.
    fn page_header(&mut self) -> Option<PageHeader> {
        let mut page = PageHeader::default();
        self.fields(MAX_DEPTH, |thrift, id, kind| {
            let size = match (id, kind) {
                (2, I32) => &mut page.n_unpacked,
                (3, I32) => &mut page.n_packed,
                (5 | 7 | 8, STRUCT) => {
                    return thrift.fields(MAX_DEPTH, |thrift, id, kind| {
                        if (id, kind) != (1, I32) {
                            return thrift.skip(kind, MAX_DEPTH);
                        }
                        page.n_values += u64::try_from(thrift.i32()?).ok()?;
                        Some(())
                    });
                }
                _ => return thrift.skip(kind, MAX_DEPTH),
            };
            *size = u64::try_from(thrift.i32()?).ok()?;
            Some(())
        })?;
        Some(page)
    }

    /// Hands the fields of a struct by number and kind to `f`, which has to read or skip them.
    fn fields(
        &mut self,
        depth: usize,
        mut f: impl FnMut(&mut Self, i16, u8) -> Option<()>,
    ) -> Option<()> {
        depth.checked_sub(1)?;
        let mut id = 0i16;
        loop {
            let byte = self.byte()?;
            let kind = byte & 15;
            if kind == STOP {
                return Some(());
            }
            id = match byte >> 4 {
                0 => self.signed()? as i16,
                delta => id.checked_add(i16::from(delta))?,
            };
            f(self, id, kind)?;
        }
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match kind {
            1 | 2 => Some(()),
            3 => self.skip_bytes(1),
            4..=6 => self.number().map(|_| ()),
            7 => self.skip_bytes(8),
            8 => {
                let n = self.number()?;
                self.skip_bytes(n)
            }
            9 | 10 => {
                let (kind, n) = self.list()?;
                (0..n).try_for_each(|_| self.skip(kind, depth))
            }
            STRUCT => self.fields(depth, |thrift, _, kind| thrift.skip(kind, depth - 1)),
            // Maps and what came later: no file of ours has them.
            _ => None,
        }
    }

    /// Kind and number of a list's items. Truth values, whose size in lists is disputed, do not
    /// occur where this looks.
    fn list(&mut self) -> Option<(u8, u64)> {
        let byte = self.byte()?;
        let n = match byte >> 4 {
            15 => self.number()?,
            n => u64::from(n),
        };
        let kind = byte & 15;
        let is_sound = n == 0 || (n <= self.left && !matches!(kind, 0..=2));
        is_sound.then_some((kind, n))
    }

    fn i32(&mut self) -> Option<i32> {
        Some(self.signed()? as i32)
    }

    fn signed(&mut self) -> Option<i64> {
        let n = self.number()?;
        Some((n >> 1) as i64 ^ -((n & 1) as i64))
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Some(number);
            }
        }
        None
    }

    fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        self.left = self.left.checked_sub(1)?;
        self.input.read_exact(&mut byte).ok()?;
        Some(byte[0])
    }

    fn skip_bytes(&mut self, n: u64) -> Option<()> {
        self.left = self.left.checked_sub(n)?;
        let skipped = copy(&mut self.input.by_ref().take(n), &mut sink()).ok()?;
        (skipped == n).then_some(())
    }
}

#[derive(Default)]
struct PageHeader {
    n_packed: u64,
    n_unpacked: u64,
    n_values: u64,
}

/// Whether nodes with these numbers of children, each followed by its children, are one tree of
/// bearable depth.
fn is_tree(n_children: &[u64]) -> bool {
    let mut open: Vec<u64> = Vec::new();
    for (i, n) in n_children.iter().enumerate() {
        match open.last_mut() {
            Some(n) => *n -= 1,
            None if i > 0 => return false,
            None => {}
        }
        if *n > n_children.len() as u64 || open.len() >= MAX_DEPTH {
            return false;
        }
        open.push(*n);
        while open.last() == Some(&0) {
            open.pop();
        }
    }
    open.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::open_samples;

    const I64: u8 = 6;
    const TEXT: u8 = 8;
    const MANY: i64 = i32::MAX as i64;

    fn varint(mut n: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while n > 127 {
            bytes.push(n as u8 | 128);
            n >>= 7;
        }
        bytes.push(n as u8);
        bytes
    }

    /// A field whose number is `delta` more than the one before.
    fn field(delta: u8, kind: u8, value: &[u8]) -> Vec<u8> {
        [&[delta << 4 | kind], value].concat()
    }

    fn int(delta: u8, kind: u8, n: i64) -> Vec<u8> {
        field(delta, kind, &varint((n << 1) as u64))
    }

    fn text(delta: u8, text: &str) -> Vec<u8> {
        field(
            delta,
            TEXT,
            &[&varint(text.len() as u64), text.as_bytes()].concat(),
        )
    }

    fn list(kind: u8, items: &[Vec<u8>]) -> Vec<u8> {
        [
            vec![0xF0 | kind],
            varint(items.len() as u64),
            items.concat(),
        ]
        .concat()
    }

    fn structure(fields: &[Vec<u8>]) -> Vec<u8> {
        [fields.concat(), vec![STOP]].concat()
    }

    /// A required column of columns.
    fn group(name: &str, n_children: i64) -> Vec<u8> {
        structure(&[int(3, I32, 0), text(1, name), int(1, I32, n_children)])
    }

    /// Optional texts.
    fn leaf(name: &str) -> Vec<u8> {
        structure(&[int(1, I32, 6), int(2, I32, 1), text(1, name)])
    }

    fn row_group(n_rows: i64, columns: &[Vec<u8>]) -> Vec<u8> {
        structure(&[
            field(1, LIST, &list(STRUCT, columns)),
            int(1, I64, 0),
            int(1, I64, n_rows),
        ])
    }

    /// The column `g.x`, whose pages begin after the magic.
    fn column(n_bytes: i64, n_values: i64) -> Vec<u8> {
        let path = [[1, b'g'].to_vec(), [1, b'x'].to_vec()];
        let metadata = structure(&[
            int(1, I32, 6),
            field(1, LIST, &list(I32, &[vec![0]])),
            field(1, LIST, &list(TEXT, &path)),
            int(1, I32, 0),
            int(1, I64, n_values),
            int(1, I64, n_bytes),
            int(1, I64, n_bytes),
            int(2, I64, 4),
        ]);
        structure(&[int(2, I64, 4), field(1, STRUCT, &metadata)])
    }

    fn message(pages: &[u8], schema: &[Vec<u8>], rest: &[Vec<u8>]) -> String {
        let start = [int(1, I32, 1), field(1, LIST, &list(STRUCT, schema))];
        let footer = structure(&[start.concat(), rest.concat()]);
        let n_footer = (footer.len() as u32).to_le_bytes();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lie.parquet");
        let file = [b"PAR1", pages, &footer, &n_footer, b"PAR1"].concat();
        std::fs::write(&path, file).unwrap();
        open_samples(&path).unwrap_err().to_string()
    }

    fn rows(n_rows: i64, columns: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let groups = list(STRUCT, &[row_group(n_rows, columns)]);
        vec![int(1, I64, n_rows), field(1, LIST, &groups)]
    }

    fn nested() -> [Vec<u8>; 3] {
        [group("root", 1), group("g", 1), leaf("x")]
    }

    #[test]
    fn columns_that_are_not_there_ask_for_no_memory() {
        let found = message(&[], &[group("root", MANY), leaf("x")], &rows(0, &[]));
        assert!(found.contains("damaged schema"), "{found}");
    }

    #[test]
    fn deep_schemas_do_not_exhaust_the_stack() {
        let mut schema = vec![group("g", 1); 100_000];
        schema.push(leaf("x"));
        let found = message(&[], &schema, &rows(0, &[]));
        assert!(found.contains("damaged schema"), "{found}");
    }

    #[test]
    fn rows_without_values_have_an_end() {
        let found = message(&[], &[group("root", 0)], &rows(1 << 40, &[]));
        assert!(found.contains("no columns"), "{found}");
        let found = message(&[], &nested(), &rows(1 << 40, &[column(0, 0)]));
        assert!(found.contains("more rows"), "{found}");
    }

    /// A page of 2³¹ nulls, which take 15 bytes.
    #[test]
    fn a_run_of_nulls_is_bounded_by_the_file() {
        let run = [varint((MANY as u64) << 1), vec![0]].concat();
        let levels = [&(run.len() as u32).to_le_bytes(), run.as_slice()].concat();
        let n_bytes = levels.len() as i64;
        let about = structure(&[
            int(1, I32, MANY),
            int(1, I32, 0),
            int(1, I32, 3),
            int(1, I32, 3),
        ]);
        let header = structure(&[
            int(1, I32, 0),
            int(1, I32, n_bytes),
            int(1, I32, n_bytes),
            field(2, STRUCT, &about),
        ]);
        let pages = [header, levels].concat();
        let column = column(pages.len() as i64, MANY);
        let found = message(&pages, &nested(), &rows(MANY, &[column]));
        assert!(found.contains("far more values"), "{found}");
    }
}
