//! What is printed: tables for people, JSON and YAML for programs.
//!
//! JSON is the protobuf mapping of the agent's own messages, so a script and a generated client see
//! the same names. A list is one array; a stream is one object a line.

use std::io::{self, Write};

use anyhow::Context as _;
use clap::ValueEnum;
use comfy_table::{Attribute, Cell as TableCell, CellAlignment, Color, ContentArrangement};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::Value;

use crate::terminal;

/// How results are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns for people.
    Table,
    /// The table with more columns and whole ids.
    Wide,
    /// The agent's messages as JSON.
    Json,
    /// The same as YAML.
    Yaml,
}

/// Where results go, and in which shape.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) format: Format,
    pub(crate) colours: bool,
}

impl Output {
    pub(crate) fn new(format: Format) -> Self {
        Self {
            format,
            colours: terminal::colours(&io::stdout()),
        }
    }

    /// Whether a program reads this: then nothing but data goes to standard output.
    pub(crate) fn for_programs(self) -> bool {
        matches!(self.format, Format::Json | Format::Yaml)
    }

    pub(crate) fn wide(self) -> bool {
        self.format == Format::Wide
    }

    /// Prints `value` as one JSON or YAML document.
    pub(crate) fn data(self, value: &Value) -> anyhow::Result<()> {
        if self.format == Format::Yaml {
            write(yaml(value)?.as_bytes())
        } else {
            let mut text = serde_json::to_string_pretty(value).context("writing JSON")?;
            text.push('\n');
            write(text.as_bytes())
        }
    }

    /// Prints one `value` of a stream: a line of JSON, or a YAML document of its own.
    pub(crate) fn item(self, value: &Value) -> anyhow::Result<()> {
        let text = if self.format == Format::Yaml {
            format!("---\n{}", yaml(value)?)
        } else {
            format!("{value}\n")
        };
        write(text.as_bytes())
    }

    /// Prints messages of several nodes as one array; with many nodes each says whose it is.
    pub(crate) fn list<'a, M: Named + 'a>(
        self,
        messages: impl IntoIterator<Item = (Option<&'a str>, &'a M)>,
    ) -> anyhow::Result<()> {
        let mut all = Vec::new();
        for (node, message) in messages {
            let mut value = json(message)?;
            if let (Some(node), Some(object)) = (node, value.as_object_mut()) {
                object.insert("node".into(), node.into());
            }
            all.push(value);
        }
        self.data(&Value::Array(all))
    }

    pub(crate) fn table(self, table: &Table) -> anyhow::Result<()> {
        write(table.render(self.wide(), self.colours).as_bytes())
    }

    pub(crate) fn text(self, text: &str) -> anyhow::Result<()> {
        write(text.as_bytes())
    }

    pub(crate) fn line(self, text: &str) -> anyhow::Result<()> {
        write(format!("{text}\n").as_bytes())
    }
}

fn write(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush())?;
    Ok(())
}

fn yaml(value: &Value) -> anyhow::Result<String> {
    let mut text = serde_saphyr::to_string(value).context("writing YAML")?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// A message whose description is known by name.
pub(crate) trait Named: Message {
    /// The full name in the protocol.
    const NAME: &'static str;
}

macro_rules! named {
    ($($message:ident),* $(,)?) => {
        $(impl Named for longshore_client::proto::$message {
            const NAME: &'static str = concat!("longshore.v1.", stringify!($message));
        })*
    };
}

named!(
    CheckResponse,
    Container,
    ContainerStats,
    Difference,
    Event,
    GetContainerResponse,
    GetImageResponse,
    GetNetworkResponse,
    GetSandboxResponse,
    GetSystemResponse,
    Image,
    InfoResponse,
    Lease,
    LogEntry,
    Network,
    Operation,
    PruneImagesResponse,
    PulledImage,
    RemoteImage,
    Sandbox,
    StatsResponse,
    System,
    UsageResponse,
    WaitContainerResponse,
);

/// `message` by the protobuf JSON mapping, zero values included.
pub(crate) fn json<M: Named>(message: &M) -> anyhow::Result<Value> {
    let name = M::NAME;
    let descriptor = pool()?
        .get_message_by_name(name)
        .with_context(|| format!("the protocol has no message {name}"))?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .with_context(|| format!("reading a {name}"))?;
    let options = SerializeOptions::new().skip_default_fields(false);
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &options)
        .with_context(|| format!("writing a {name} as JSON"))
}

fn pool() -> anyhow::Result<DescriptorPool> {
    static POOL: std::sync::OnceLock<Result<DescriptorPool, String>> = std::sync::OnceLock::new();
    POOL.get_or_init(|| {
        DescriptorPool::decode(longshore_proto::longshore::v1::FILE_DESCRIPTOR_SET)
            .map_err(|error| error.to_string())
    })
    .clone()
    .map_err(|error| anyhow::anyhow!("the protocol's own description cannot be read: {error}"))
}

/// How a cell's text is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Good,
    Warn,
    Bad,
    Dim,
}

/// One cell.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub(crate) fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self {
            text: text.into(),
            tone,
        }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::toned(text, Tone::Plain)
    }
}

/// A row of anything that can be a cell.
macro_rules! row {
    ($($cell:expr),* $(,)?) => { vec![$($crate::output::Cell::from($cell)),*] };
}
pub(crate) use row;

/// A column: its title, whether only the wide table has it, and its side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    title: &'static str,
    wide: bool,
    right: bool,
}

impl Column {
    pub(crate) const fn text(title: &'static str) -> Self {
        Self {
            title,
            wide: false,
            right: false,
        }
    }

    pub(crate) const fn number(title: &'static str) -> Self {
        Self {
            title,
            wide: false,
            right: true,
        }
    }

    pub(crate) const fn wide(title: &'static str) -> Self {
        Self {
            title,
            wide: true,
            right: false,
        }
    }
}

/// Rows under titles; the wide columns are left out unless asked for.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    pub(crate) fn new(columns: &[Column]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Puts a column of the same meaning before all others, as the node in a list of many nodes.
    pub(crate) fn first(mut self, column: Option<Column>) -> Self {
        if let Some(column) = column {
            self.columns.insert(0, column);
        }
        self
    }

    pub(crate) fn push(&mut self, row: Vec<Cell>) {
        debug_assert_eq!(row.len(), self.columns.len(), "a row has a cell per column");
        self.rows.push(row);
    }

    pub(crate) fn render(&self, wide: bool, colours: bool) -> String {
        let shown = |column: &Column| wide || !column.wide;
        let mut table = comfy_table::Table::new();
        table
            .load_style(comfy_table::presets::NOTHING)
            // Cells are never wrapped: a line is a row, for eyes and for grep.
            .set_content_arrangement(ContentArrangement::Disabled);
        if colours {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        table.set_header(
            self.columns
                .iter()
                .filter(|column| shown(column))
                .map(|column| {
                    let cell = TableCell::new(column.title);
                    if colours {
                        cell.add_attribute(Attribute::Bold)
                    } else {
                        cell
                    }
                }),
        );
        for row in &self.rows {
            let cells = self
                .columns
                .iter()
                .zip(row)
                .filter(|(column, _)| shown(column));
            table.add_row(cells.map(|(_, cell)| styled(cell, colours)));
        }
        let rights: Vec<bool> = self
            .columns
            .iter()
            .filter(|column| shown(column))
            .map(|column| column.right)
            .collect();
        for (column, right) in table.column_iter_mut().zip(rights) {
            column.set_padding((0, 2));
            if right {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let mut text = String::new();
        for line in table.lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

fn styled(cell: &Cell, colours: bool) -> TableCell {
    let shown = TableCell::new(&cell.text);
    let colour = match cell.tone {
        _ if !colours => return shown,
        Tone::Plain => return shown,
        Tone::Good => Color::Green,
        Tone::Warn => Color::Yellow,
        Tone::Bad => Color::Red,
        Tone::Dim => Color::DarkGrey,
    };
    shown.fg(colour)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&[
            Column::text("NAME"),
            Column::number("SIZE"),
            Column::wide("MORE"),
        ]);
        table.push(row!["web", "1.00MiB", "x"]);
        table.push(row![Cell::toned("database", Tone::Good), "9B", "y"]);
        table
    }

    #[test]
    fn a_table_is_aligned_and_has_no_trailing_space() {
        assert_eq!(
            table().render(false, false),
            "NAME         SIZE\nweb       1.00MiB\ndatabase       9B\n"
        );
    }

    #[test]
    fn wide_columns_come_only_when_asked_for() {
        assert_eq!(
            table().render(true, false),
            "NAME         SIZE  MORE\nweb       1.00MiB  x\ndatabase       9B  y\n"
        );
    }

    #[test]
    fn colours_are_only_added_when_wanted() {
        assert!(!table().render(false, false).contains('\u{1b}'));
        assert!(table().render(false, true).contains('\u{1b}'));
    }

    #[test]
    fn messages_are_shown_by_the_protobuf_mapping() {
        use longshore_client::proto::{Container, ContainerState, Exit};
        let container = Container {
            id: "abc".into(),
            state: ContainerState::Exited.into(),
            exit: Some(Exit {
                code: 3,
                ..Default::default()
            }),
            created_at: Some(prost_types::Timestamp {
                seconds: 1,
                nanos: 0,
            }),
            ..Default::default()
        };
        let value = json(&container).expect("described");
        assert_eq!(value["state"], "CONTAINER_STATE_EXITED");
        assert_eq!(value["exit"]["code"], 3);
        assert_eq!(value["createdAt"], "1970-01-01T00:00:01Z");
        assert_eq!(value["pid"], 0, "zero values are there, for scripts");
    }

    #[test]
    fn yaml_ends_with_one_line_break() {
        let text = yaml(&serde_json::json!({"a": [1, "2"]})).expect("plain data");
        assert!(text.ends_with('\n') && !text.ends_with("\n\n"), "{text:?}");
    }
}
