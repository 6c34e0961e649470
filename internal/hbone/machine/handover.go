package machine

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// State is a Conn as a value, so that another process can go on with it. Output is part of it.
type State struct {
	Config   Config // what this side has told the peer
	Begun    bool   // the peer's first SETTINGS was seen
	Preface  string `json:",omitempty"` // what of the client's preface is still to come
	Frame    FrameState
	Output   []byte              `json:",omitempty"`
	Table    []hpack.HeaderField `json:",omitempty"` // of the decoder, newest first
	Tokens   int                 // of the budget
	Streams  []StreamState       `json:",omitempty"`
	NextID   uint32
	LastPeer uint32

	SendWindow, InitialWindow, RecvWindow, Credit int64

	PeerFrame, PeerStreams int
	PeerTable              uint32 // the size of table that the peer's decoder keeps at most
	SentGoAway, GotGoAway  bool
}

// FrameState is where in a frame the input stood.
type FrameState struct {
	Header   []byte `json:",omitempty"` // of a frame header that is not whole
	Open     bool   `json:",omitempty"` // inside of the frame that the rest tells of
	Type     byte   `json:",omitempty"`
	Flags    byte   `json:",omitempty"`
	ID       uint32 `json:",omitempty"`
	Left     int    `json:",omitempty"`
	Pad      int    `json:",omitempty"`
	Owned    bool   `json:",omitempty"` // DATA of a stream that was there when the frame began
	Payload  []byte `json:",omitempty"`
	Block    []byte `json:",omitempty"`
	BlockID  uint32 `json:",omitempty"`
	BlockEnd bool   `json:",omitempty"`
}

// StreamState is one stream, or (Gone) one that is over while its owner still holds bytes of it.
type StreamState struct {
	ID                                   uint32
	SendWindow, RecvWindow, Credit, Held int64
	SentEnd, GotEnd, Gone, Answered      bool
}

// Export is c's state between two calls of Next that used up their input, with the open streams in the order that
// streams names them, and those that are over but named as well. It does not change c.
func (c *Conn) Export(streams []*Stream) (State, error) {
	if c.err != nil {
		return State{}, fmt.Errorf("export HTTP/2 state: %w", c.err)
	}
	if len(c.pending) > 0 {
		return State{}, errors.New("export HTTP/2 state: events are waiting")
	}
	i := &c.in
	s := State{Config: c.cfg, Begun: i.begun, Preface: i.preface, Output: bytes.Clone(c.Output()), Table: c.decoderTable(),
		Tokens: c.budget.tokens, NextID: c.nextID, LastPeer: c.lastPeer, SendWindow: c.sendWin, InitialWindow: c.initWin,
		RecvWindow: c.recvWin, Credit: c.credit, PeerFrame: c.peerFrame, PeerStreams: c.peerStreams,
		PeerTable: c.peerTable, SentGoAway: c.sentGoAway, GotGoAway: c.gotGoAway,
		Frame: FrameState{Header: bytes.Clone(i.hdr[:i.hdrn]), Block: bytes.Clone(i.block), BlockID: i.blockID, BlockEnd: i.blockEnd}}
	if i.open {
		f := &s.Frame
		f.Open, f.Type, f.Flags, f.ID, f.Left, f.Pad = true, i.typ, i.flags, i.id, i.left, i.pad
		f.Owned, f.Payload = i.dst != nil, bytes.Clone(i.payload)
	}
	open := 0
	for _, m := range streams {
		if !m.gone {
			open++
		}
		s.Streams = append(s.Streams, StreamState{ID: m.id, SendWindow: m.sendWin, RecvWindow: m.recvWin, Credit: m.credit,
			Held: m.held, SentEnd: m.sentEnd, GotEnd: m.gotEnd, Gone: m.gone, Answered: m.answered})
	}
	if open != len(c.streams) {
		return State{}, errors.New("export HTTP/2 state: not all streams are named")
	}
	return s, nil
}

// decoderTable reads the decoder's dynamic table, newest first, by indexed fields, which do not change it.
func (c *Conn) decoderTable() (table []hpack.HeaderField) {
	c.hdec.SetEmitFunc(func(f hpack.HeaderField) { table = append(table, f) })
	defer c.hdec.SetEmitFunc(c.list.add)
	const static = 61
	for n, index := 0, static+1; ; index++ {
		_, err := c.hdec.Write(appendInteger(nil, 0x80, 7, index))
		_ = c.hdec.Close() // the next block is a new one; nothing is left of this
		if err != nil || len(table) == n {
			return table
		}
		n = len(table)
	}
}

// appendInteger is the integer of RFC 7541 §5.1, behind the bits of first.
func appendInteger(b []byte, first byte, prefix uint, v int) []byte {
	most := 1<<prefix - 1
	if v < most {
		return append(b, first|byte(v))
	}
	b = append(b, first|byte(most))
	for v -= most; v >= 128; v >>= 7 {
		b = append(b, byte(v)|0x80)
	}
	return append(b, byte(v))
}

// fillTable gives a new decoder a dynamic table, as literal fields with indexing. A limit that the peer has set for
// itself below the table's size is not needed: its newest entries are the same.
func (c *Conn) fillTable(table []hpack.HeaderField) error {
	var b []byte
	for i := len(table) - 1; i >= 0; i-- {
		f := table[i]
		b = append(b, 0x40)
		b = append(appendInteger(b, 0, 7, len(f.Name)), f.Name...)
		b = append(appendInteger(b, 0, 7, len(f.Value)), f.Value...)
	}
	c.hdec.SetEmitFunc(func(hpack.HeaderField) {})
	defer c.hdec.SetEmitFunc(c.list.add)
	if _, err := c.hdec.Write(b); err != nil {
		return err
	}
	return c.hdec.Close()
}

// Import makes a Conn that goes on where the exported one stood, and its streams in the order of State.Streams. The
// scale of Advance may be another one.
func Import(s State) (*Conn, []*Stream, error) {
	if err := s.check(); err != nil {
		return nil, nil, fmt.Errorf("import HTTP/2 state: %w", err)
	}
	c := New(s.Config)
	c.out = s.Output
	if err := c.fillTable(s.Table); err != nil {
		return nil, nil, fmt.Errorf("import HTTP/2 state: header table: %w", err)
	}
	// The peer's decoder may know fields that this encoder does not: it is told to forget them.
	c.peerTable = s.PeerTable
	c.henc.SetMaxDynamicTableSizeLimit(s.PeerTable)
	c.henc.SetMaxDynamicTableSize(0)
	c.henc.SetMaxDynamicTableSize(s.PeerTable)
	c.budget.tokens = s.Tokens
	c.nextID, c.lastPeer = s.NextID, s.LastPeer
	c.sendWin, c.initWin, c.recvWin, c.credit = s.SendWindow, s.InitialWindow, s.RecvWindow, s.Credit
	c.sendPeak = max(defaultWindow, c.sendWin)
	c.peerFrame, c.peerStreams = s.PeerFrame, s.PeerStreams
	c.sentGoAway, c.gotGoAway = s.SentGoAway, s.GotGoAway
	streams := make([]*Stream, 0, len(s.Streams))
	var gone *Stream
	for _, m := range s.Streams {
		n := &Stream{c: c, id: m.ID, sendWin: m.SendWindow, recvWin: m.RecvWindow, credit: m.Credit, held: m.Held,
			sentEnd: m.SentEnd, gotEnd: m.GotEnd, gone: m.Gone, answered: m.Answered}
		if !n.gone {
			c.streams[n.id] = n
		} else if n.id == s.Frame.ID {
			gone = n
		}
		streams = append(streams, n)
	}
	c.importFrame(&s, gone)
	return c, streams, nil
}

func (c *Conn) importFrame(s *State, gone *Stream) {
	f, i := &s.Frame, &c.in
	i.preface, i.begun = s.Preface, s.Begun
	i.hdrn = copy(i.hdr[:], f.Header)
	i.block, i.blockID, i.blockEnd = f.Block, f.BlockID, f.BlockEnd
	if !f.Open {
		return
	}
	i.open, i.typ, i.flags, i.id, i.left, i.pad, i.payload = true, f.Type, f.Flags, f.ID, f.Left, f.Pad, f.Payload
	if f.Owned {
		if i.dst = c.streams[f.ID]; i.dst == nil {
			if i.dst = gone; gone == nil {
				i.dst = &Stream{c: c, id: f.ID, gone: true}
			}
		}
	}
}

// check refuses what no Export can have given, as far as it would do harm.
func (s *State) check() error {
	limits := s.Config
	window := func(n int64) bool { return n >= -maxWindow && n <= maxWindow }
	switch {
	case limits.StreamWindow < 1 || limits.StreamWindow > maxWindow || limits.ConnWindow < defaultWindow || limits.ConnWindow > maxWindow ||
		limits.MaxFrame < minFrame || limits.MaxFrame > 1<<24-1 || limits.MaxHeaderList < 1 || limits.MaxHeaderList > 1<<24 || limits.MaxStreams < 0:
		return errors.New("configuration out of bounds")
	case !strings.HasSuffix(preface, s.Preface) || s.Preface != "" && (!limits.Server || s.Begun):
		return errors.New("bad preface")
	case !window(s.SendWindow) || !window(s.InitialWindow) || !window(s.RecvWindow) || s.Credit < 0 || s.Credit > maxWindow ||
		s.NextID > maxWindow+2 || s.NextID%2 != 1 || s.LastPeer > maxWindow || s.PeerTable > tableSize ||
		s.PeerFrame < minFrame || s.PeerFrame > 1<<24-1 || s.PeerStreams < 0 || s.Tokens < 0 || s.Tokens > budgetMax:
		return errors.New("numbers out of bounds")
	case len(s.Table) > tableSize/32:
		return errors.New("too large a header table")
	}
	seen := map[uint32]bool{}
	for _, m := range s.Streams {
		if m.ID%2 != 1 || m.ID > maxWindow || seen[m.ID] || !window(m.SendWindow) || !window(m.RecvWindow) ||
			m.Credit < 0 || m.Credit > maxWindow || m.Held < 0 || m.Held > maxWindow || !m.Gone && m.SentEnd && m.GotEnd {
			return fmt.Errorf("stream %d out of bounds", m.ID)
		}
		seen[m.ID] = true
	}
	return s.Frame.check(&limits)
}

func (f *FrameState) check(limits *Config) error {
	control := f.Open && f.Type != frameData
	switch {
	case len(f.Header) >= HeaderLen || f.Open && len(f.Header) > 0,
		f.Left < 0 || f.Left > limits.MaxFrame || f.Pad < -1 || f.Pad > max(f.Left, 255) || f.Pad > f.Left && f.Pad > 0,
		f.Pad < 0 && f.Left == 0 || f.Pad != 0 && control,
		len(f.Payload) > 0 && !control || len(f.Payload) > limits.MaxFrame,
		len(f.Block) > limits.MaxHeaderList+256+6, f.BlockID == 0 && len(f.Block) > 0,
		f.ID > maxWindow || f.BlockID > maxWindow || f.Owned && (f.Type != frameData || f.ID == 0):
		return errors.New("frame out of bounds")
	}
	return nil
}
