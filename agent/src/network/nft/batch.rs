//! A transaction: messages for one table, applied together or not at all.

use std::{collections::BTreeSet, io};

use netlink_bindings::{
    nftables::{
        Chained, ChainedFinal, CmpOps, CtKeys, Nfgenmsg, PushExprAttrs, PushExprListAttrs,
        PushRuleAttrs, SetFlags, VerdictCode,
    },
    traits::{NetlinkChained, Pusher},
    utils::{RequestBuf, finalize_nested_header, push_header, push_nested_header},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::net::sockopt;

use super::{
    super::error::NetworkError,
    Published, Sockets, family, header,
    map::Map,
    rules::{
        Chain,
        Expr::{
            self, ConnectionStatus, DestinationType, Is, IsNot, Lookup, Mask, Masquerade, Meta,
            Payload, Translate, Verdict,
        },
        RANDOM_FULLY, REGISTER, VALUE,
    },
};

/// Elements of one message: an attribute can't be longer than 64 KiB, an element takes 140 bytes.
const ELEMENTS_PER_MESSAGE: usize = 256;

/// What a socket takes without being asked for more.
const USUAL_BUFFER: usize = 128 << 10;

/// A transaction on one table.
pub(super) struct Batch<'a> {
    table: &'a str,
    chain: Chained<'static>,
    maps: u32,
}

impl<'a> Batch<'a> {
    pub(super) fn new(table: &'a str, sockets: &Sockets) -> Self {
        let mut batch = Self {
            table,
            chain: Chained::new(sockets.sequence),
            maps: 0,
        };
        batch.chain.request().op_batch_begin_do(&nftables());
        batch
    }

    /// Creating it first lets the deletion succeed in any case.
    pub(super) fn delete_table(&mut self) {
        let header = header(family::INET);
        let create = self.chain.request().set_create();
        create
            .op_newtable_do(&header)
            .encode()
            .push_name_bytes(self.table.as_bytes());
        self.chain
            .request()
            .op_deltable_do(&header)
            .encode()
            .push_name_bytes(self.table.as_bytes());
    }

    pub(super) fn replace_table(&mut self) {
        self.delete_table();
        let create = self.chain.request().set_create();
        create
            .op_newtable_do(&header(family::INET))
            .encode()
            .push_name_bytes(self.table.as_bytes());
    }

    pub(super) fn new_map(&mut self, map: Map) {
        let (key_type, data_type) = map.types();
        let key_len = u32::try_from(map.key_len()).expect("at most 24");
        let data_len = u32::try_from(map.address_len() + 4).expect("at most 20");
        self.maps += 1;
        let create = self.chain.request().set_create();
        create
            .op_newset_do(&header(family::INET))
            .encode()
            .push_table_bytes(self.table.as_bytes())
            .push_name_bytes(map.name().as_bytes())
            .push_flags(SetFlags::Map as u32)
            .push_key_type(key_type)
            .push_key_len(key_len)
            .push_data_type(data_type)
            .push_data_len(data_len)
            .push_id(self.maps);
    }

    pub(super) fn new_chain(&mut self, chain: &Chain) {
        let create = self.chain.request().set_create();
        let mut request = create.op_newchain_do(&header(family::INET));
        let push = request
            .encode()
            .push_table_bytes(self.table.as_bytes())
            .push_name_bytes(chain.name.as_bytes());
        if let Some((kind, hook, priority)) = chain.base {
            push.nested_hook()
                .push_num(hook)
                .push_priority(priority)
                .end_nested()
                .push_policy(VerdictCode::Accept as u32)
                .push_type_bytes(kind.as_bytes());
        }
    }

    pub(super) fn new_rule(&mut self, chain: &str, rule: &[Expr]) {
        let create = self.chain.request().set_append().set_create();
        let mut list = create
            .op_newrule_do(&header(family::INET))
            .into_encoder()
            .push_table_bytes(self.table.as_bytes())
            .push_chain_bytes(chain.as_bytes())
            .nested_expressions();
        for expr in rule {
            list = push_expr(list, expr);
        }
        list.end_nested();
    }

    pub(super) fn new_elements(&mut self, elements: &[Published]) {
        self.elements(elements, true);
    }

    pub(super) fn delete_elements(&mut self, elements: &[Published]) {
        self.elements(elements, false);
    }

    fn elements(&mut self, elements: &[Published], add: bool) {
        for map in Map::ALL {
            let of_map: Vec<_> = elements.iter().filter(|one| Map::of(one) == map).collect();
            for chunk in of_map.chunks(ELEMENTS_PER_MESSAGE) {
                let request = self.chain.request();
                let header = header(family::INET);
                let push = if add {
                    let request = request.set_create();
                    request.op_newsetelem_do(&header).into_encoder()
                } else {
                    request.op_delsetelem_do(&header).into_encoder()
                };
                let mut list = push
                    .push_table_bytes(self.table.as_bytes())
                    .push_set_bytes(map.name().as_bytes())
                    .nested_elements();
                for one in chunk {
                    let key = list.nested_elem().nested_key().push_value(&one.key());
                    let mut element = key.end_nested();
                    if add {
                        let data = element.nested_data().push_value(&one.data());
                        element = data.end_nested().push_userdata(&one.userdata());
                    }
                    list = element.end_nested();
                }
                list.end_nested();
            }
        }
    }

    pub(super) fn commit(
        mut self,
        call: &'static str,
        sockets: &mut Sockets,
    ) -> Result<(), NetworkError> {
        self.chain.request().op_batch_end_do(&nftables());
        let batch = self.chain.finalize();
        let length = u32::try_from(batch.chain_len()).expect("far fewer");
        sockets.sequence = sockets.sequence.wrapping_add(length);
        transact(&batch, &mut sockets.batches).map_err(|(place, source)| {
            // What is still to be read from it would be an answer to nothing.
            sockets.batches = None;
            let subject = match place {
                Some(place) => format!("{}, {} #{place}", self.table, batch.name(place)),
                None => self.table.to_owned(),
            };
            NetworkError::kernel(call, subject, source)
        })
    }
}

/// Sends a batch and waits for the answer to each of its messages; an error comes with the place
/// of the message that caused it.
///
/// Not by the library's socket: it can't make room for a batch of more than 200 KiB, which a start
/// with a thousand published ports is.
fn transact(
    batch: &ChainedFinal<'_>,
    kept: &mut Option<Socket>,
) -> Result<(), (Option<usize>, io::Error)> {
    let no_place = |error: io::Error| (None, error);
    let socket = match kept {
        Some(socket) => socket,
        None => kept.insert(connect().map_err(no_place)?),
    };
    let bytes = batch.payload();
    make_room(socket, bytes.len(), batch.chain_len()).map_err(no_place)?;
    socket.send(bytes, 0).map_err(no_place)?;
    let mut waiting: BTreeSet<_> = (0..batch.chain_len())
        .filter(|place| batch.supports_ack(*place) == Some(true))
        .collect();
    while !waiting.is_empty() {
        let datagram = match socket.recv_from_full() {
            Ok((datagram, _)) => datagram,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(no_place(error)),
        };
        for answer in Answers(&datagram) {
            let Some(place) = NetlinkChained::get_index(batch, answer.sequence) else {
                continue;
            };
            match answer.error {
                Some(0) => {
                    waiting.remove(&place);
                }
                Some(code) => {
                    let error = io::Error::from_raw_os_error(-code);
                    return Err((Some(place), error));
                }
                None => {}
            }
        }
    }
    Ok(())
}

fn connect() -> io::Result<Socket> {
    let socket = Socket::new(NETLINK_NETFILTER)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // Errors then carry the header only, not the whole message.
    socket.set_cap_ack(true)?;
    Ok(socket)
}

fn make_room(socket: &Socket, bytes: usize, messages: usize) -> io::Result<()> {
    // The kernel counts each answer as about 1 KiB.
    let answers = messages << 10;
    if bytes > USUAL_BUFFER {
        sockopt::set_socket_send_buffer_size_force(socket, bytes + 4096)?;
    }
    if answers > USUAL_BUFFER {
        sockopt::set_socket_recv_buffer_size_force(socket, answers)?;
    }
    Ok(())
}

/// The messages in a datagram, as far as we need them.
struct Answers<'a>(&'a [u8]);

struct Answer {
    sequence: u32,
    error: Option<i32>,
}

impl Iterator for Answers<'_> {
    type Item = Answer;

    fn next(&mut self) -> Option<Answer> {
        /// `NLMSG_ERROR`, which also acknowledges.
        const ERROR: [u8; 2] = 2_u16.to_ne_bytes();
        let word = |at: usize| Some(<[u8; 4]>::try_from(self.0.get(at..at + 4)?).expect("4 bytes"));
        let length = usize::try_from(u32::from_ne_bytes(word(0)?)).ok()?;
        let answer = Answer {
            sequence: u32::from_ne_bytes(word(8)?),
            error: match self.0.get(4..6)? == ERROR {
                true => Some(i32::from_ne_bytes(word(16)?)),
                false => None,
            },
        };
        let next = length.max(16).next_multiple_of(4).min(self.0.len());
        self.0 = &self.0[next..];
        Some(answer)
    }
}

fn nftables() -> Nfgenmsg {
    let mut header = header(family::UNSPEC);
    // NFNL_SUBSYS_NFTABLES
    header.set_res_id(10);
    header
}

type ExprList<'a> = PushExprListAttrs<PushRuleAttrs<RequestBuf<'a>>>;

fn push_expr<'a>(list: ExprList<'a>, expr: &Expr) -> ExprList<'a> {
    /// `NFT_FIB_RESULT_ADDRTYPE`, `NFTA_FIB_F_DADDR`.
    const FIB: (u32, u32) = (3, 1 << 1);
    let elem = list.nested_elem();
    match expr {
        Meta(key, register) => elem
            .nested_data_meta()
            .push_dreg(*register)
            .push_key(*key as u32)
            .end_nested()
            .end_nested(),
        Payload(base, offset, length, register) => elem
            .nested_data_payload()
            .push_dreg(*register)
            .push_base(*base as u32)
            .push_offset(*offset)
            .push_len(*length)
            .end_nested()
            .end_nested(),
        Is(bytes) | IsNot(bytes) => {
            let op = match expr {
                Is(_) => CmpOps::Eq,
                _ => CmpOps::Neq,
            };
            elem.nested_data_cmp()
                .push_sreg(REGISTER)
                .push_op(op as u32)
                .nested_data()
                .push_value(bytes)
                .end_nested()
                .end_nested()
                .end_nested()
        }
        Mask(mask) => elem
            .nested_data_bitwise()
            .push_sreg(REGISTER)
            .push_dreg(REGISTER)
            .push_len(u32::try_from(mask.len()).expect("at most 16"))
            .nested_mask()
            .push_value(mask)
            .end_nested()
            .nested_xor()
            .push_value(&vec![0; mask.len()])
            .end_nested()
            .end_nested()
            .end_nested(),
        DestinationType => elem
            .nested_data_fib()
            .push_dreg(REGISTER)
            .push_result(FIB.0)
            .push_flags(FIB.1)
            .end_nested()
            .end_nested(),
        ConnectionStatus => elem
            .nested_data_ct()
            .push_dreg(REGISTER)
            .push_key(CtKeys::Status as u32)
            .end_nested()
            .end_nested(),
        Lookup(map) => {
            const SET: u16 = 1;
            const SOURCE: u16 = 2;
            const DESTINATION: u16 = 3;
            let name = [map.name().as_bytes(), &[0]].concat();
            raw_expr(
                elem,
                "lookup",
                &[
                    (SET, &name),
                    (SOURCE, &REGISTER.to_be_bytes()),
                    (DESTINATION, &VALUE.to_be_bytes()),
                ],
            )
        }
        Translate(map) => {
            let nfproto = if map.is_v4() {
                family::IPV4
            } else {
                family::IPV6
            };
            let length = u32::try_from(map.address_len()).expect("4 or 16");
            elem.nested_data_nat()
                // NFT_NAT_DNAT
                .push_type(1)
                .push_family(nfproto.into())
                .push_reg_addr_min(VALUE)
                .push_reg_proto_min(VALUE + length / 4)
                .end_nested()
                .end_nested()
        }
        Masquerade => {
            const FLAGS: u16 = 1;
            raw_expr(elem, "masq", &[(FLAGS, &RANDOM_FULLY.to_be_bytes())])
        }
        Verdict(code, chain) => {
            let mut verdict = elem
                .nested_data_immediate()
                .push_dreg(0)
                .nested_data()
                .nested_verdict()
                .push_code(*code as u32);
            if let Some(chain) = chain {
                verdict = verdict.push_chain_bytes(chain.as_bytes());
            }
            verdict.end_nested().end_nested().end_nested().end_nested()
        }
    }
}

/// Writes an expression that the library can't (`masq`), or whose attributes it has in another
/// order than the kernel (`lookup`).
fn raw_expr<'a>(
    elem: PushExprAttrs<ExprList<'a>>,
    name: &str,
    attributes: &[(u16, &[u8])],
) -> ExprList<'a> {
    const NFTA_EXPR_DATA: u16 = 2;
    let mut elem = elem.push_name_bytes(name.as_bytes());
    let bytes = elem.as_vec_mut();
    let data = push_nested_header(bytes, NFTA_EXPR_DATA);
    for (kind, value) in attributes {
        let length = u16::try_from(value.len()).expect("attributes are short");
        push_header(bytes, *kind, length);
        bytes.extend(*value);
    }
    finalize_nested_header(bytes, data);
    elem.end_nested()
}
