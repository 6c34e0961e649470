// Package machine (protocols) is HTTP/2 as HBONE uses it, CONNECT streams only, without I/O: bytes go in by Next, which
// gives events; frames come out by Output and DataHeader. It has no clock, goroutine or lock: its owner calls it from one
// goroutine at a time and says by Advance how time goes on.
//
// DATA payload never passes through the machine's own memory. Coming in, Event.Data points into the bytes given to Next;
// going out, the owner writes a frame header with DataHeader and the payload behind it. Output's bytes must leave before
// a DATA frame of the same moment does, since the stream's HEADERS may be among them.
package machine

import (
	"bytes"
	"fmt"
	"math"
	"time"

	"golang.org/x/net/http2/hpack"
)

// Error codes of RFC 9113 §7 that this package sends or its owner needs.
const (
	CodeNo            = 0x0
	CodeProtocol      = 0x1
	CodeInternal      = 0x2
	CodeFlowControl   = 0x3
	CodeStreamClosed  = 0x5
	CodeFrameSize     = 0x6
	CodeRefusedStream = 0x7
	CodeCancel        = 0x8
	CodeCompression   = 0x9
	CodeConnect       = 0xa
	CodeCalm          = 0xb
)

const (
	defaultWindow   = 65535
	maxWindow       = math.MaxInt32
	minFrame        = 16 << 10
	tableSize       = 4096 // hpack dynamic table, either direction
	maxOutput       = 256 << 10
	maxHeaderFields = 128
)

// Config sets one side's parameters. All fields must be set.
type Config struct {
	Server        bool
	StreamWindow  int // offered per stream, bytes; at least 65535, which peers take for granted before they know
	ConnWindow    int // offered for the connection, bytes; at least 65535
	MaxFrame      int // largest frame payload accepted, at least 16 KiB
	MaxHeaderList int // largest header list accepted, bytes by RFC 9113 §6.5.2
	MaxStreams    int // streams the peer may have open (server)
}

// ConnError breaks the whole connection. The GOAWAY that says so to the peer is in Output.
type ConnError struct {
	Code   uint32
	Reason string
}

func (e *ConnError) Error() string { return fmt.Sprintf("http2: %s (code %d)", e.Reason, e.Code) }

// Kind says what an Event is about.
type Kind uint8

const (
	None     Kind = iota // all input was used up
	Request              // server: a CONNECT. Authority, Header
	Answer               // client: the final answer. Status, Header; End when the peer ended the stream with it
	Data                 // Data (may be empty) and End
	Reset                // the peer reset the stream, or a GOAWAY left it out (Code is then REFUSED_STREAM)
	Writable             // a window opened: of Stream, or when that is nil of any
	Settings             // the peer's limit of streams may have changed: PeerMaxStreams
	Pong                 // the answer to Ping
	GoAway               // the peer takes no new streams. Code
)

// Event is something that happened. Data is valid only until the bytes given to Next are.
type Event struct {
	Kind      Kind
	End       bool
	Status    int
	Code      uint32
	Stream    *Stream
	Data      []byte
	Authority string
	Header    []hpack.HeaderField
}

// Conn is one side of a connection.
type Conn struct {
	cfg Config

	in      input
	pending []Event // events beyond the one that Next returned
	budget  budget
	err     *ConnError

	out  []byte
	outn int // flushed from out's front
	hbuf bytes.Buffer
	henc *hpack.Encoder
	hdec *hpack.Decoder
	list headerList

	streams  map[uint32]*Stream
	nextID   uint32 // client
	lastPeer uint32 // server: highest stream id seen

	sendWin, initWin int64 // what the peer lets us send: connection, each new stream
	sendPeak         int64 // the most that sendWin has been
	recvWin          int64 // what we let the peer send on the connection
	credit           int64 // consumed and not yet told
	underWay         int64 // the most that recvWin becomes
	peerFrame        int
	peerStreams      int
	peerTable        uint32 // of the peer's hpack decoder
	sentGoAway       bool
	gotGoAway        bool
}

// New makes a connection whose preface and settings wait in Output.
func New(cfg Config) *Conn {
	c := &Conn{cfg: cfg, streams: map[uint32]*Stream{}, nextID: 1, sendWin: defaultWindow, sendPeak: defaultWindow,
		initWin: defaultWindow, recvWin: int64(cfg.ConnWindow), underWay: maxWindow, peerFrame: minFrame, peerStreams: math.MaxInt32,
		peerTable: tableSize}
	c.henc = hpack.NewEncoder(&c.hbuf)
	c.hdec = hpack.NewDecoder(tableSize, c.list.add)
	c.hdec.SetMaxStringLength(cfg.MaxHeaderList)
	c.budget.tokens = budgetMax
	set := [][2]uint32{{settingStreamWindow, uint32(cfg.StreamWindow)}, {settingMaxFrame, uint32(cfg.MaxFrame)},
		{settingMaxHeaderList, uint32(cfg.MaxHeaderList)}}
	if cfg.Server {
		c.in.preface = preface
		set = append(set, [2]uint32{settingMaxStreams, uint32(cfg.MaxStreams)})
	} else {
		c.out = append(c.out, preface...)
		set = append(set, [2]uint32{settingPush, 0})
	}
	c.out = appendSettings(c.out, set)
	if n := cfg.ConnWindow - defaultWindow; n > 0 {
		c.out = appendUint32Frame(c.out, frameWindowUpdate, 0, uint32(n))
	}
	return c
}

// Advance says that time has gone on to now, on any monotonic scale. It refills the budgets for what peers may do only
// so often; without it they are spent once.
func (c *Conn) Advance(now time.Duration) { c.budget.advance(now) }

// Output is what waits to be sent, in order. Flushed says how much of it was.
func (c *Conn) Output() []byte { return c.out[c.outn:] }

// Flushed takes n bytes off the front of Output.
func (c *Conn) Flushed(n int) {
	if c.outn += n; c.outn == len(c.out) {
		c.outn = 0
		if cap(c.out) > 4096 { // an idle connection keeps no big buffer
			c.out = nil
		} else {
			c.out = c.out[:0]
		}
	}
}

// Open says that the connection's window lets payload out.
func (c *Conn) Open() bool { return c.sendWin > 0 }

// Streams counts the open streams.
func (c *Conn) Streams() int { return len(c.streams) }

// Newest is the identifier of the newest stream that the peer has opened (server), 0 for none.
func (c *Conn) Newest() uint32 { return c.lastPeer }

// PeerMaxStreams is how many streams the peer lets us open.
func (c *Conn) PeerMaxStreams() int { return c.peerStreams }

// Each calls f for every open stream. f may reset it.
func (c *Conn) Each(f func(*Stream)) {
	for _, s := range c.streams {
		f(s)
	}
}

// Draining says that no more streams will be opened: a GOAWAY was sent or received.
func (c *Conn) Draining() bool { return c.sentGoAway || c.gotGoAway }

// Ping asks the peer for a Pong.
func (c *Conn) Ping() {
	if c.err == nil {
		c.out = appendHeader(c.out, 8, framePing, 0, 0)
		c.out = append(c.out, "fairlead"...)
	}
}

// GoAway tells the peer that no new streams will be taken; those that are open go on.
func (c *Conn) GoAway() { c.goAway(CodeNo, "") }

func (c *Conn) goAway(code uint32, reason string) {
	if c.sentGoAway && code == CodeNo {
		return
	}
	c.sentGoAway = true
	c.out = appendHeader(c.out, 8+len(reason), frameGoAway, 0, 0)
	c.out = appendUint32(appendUint32(c.out, c.lastPeer), code)
	c.out = append(c.out, reason...)
}

// fail breaks the connection.
func (c *Conn) fail(code uint32, reason string) error {
	if c.err == nil {
		c.goAway(code, reason)
		c.err = &ConnError{Code: code, Reason: reason}
		c.pending = nil
	}
	return c.err
}

// giveConn returns n bytes of credit on the connection's window.
func (c *Conn) giveConn(n int64) {
	c.credit += n
	c.tellCredit()
}

// tellCredit tells the peer of credit when that is much, or as much as the peer has left: what is not read of some streams
// may hold most of the window, and the others go on with the rest.
func (c *Conn) tellCredit() {
	n := min(c.credit, c.underWay-c.recvWin)
	if n < c.muchCredit() && n < max(c.recvWin, tinyWindow) {
		return
	}
	c.recvWin += n
	c.credit -= n
	c.out = appendUint32Frame(c.out, frameWindowUpdate, 0, uint32(n))
}

// Low says that the peer may send little more on the connection until more is Consumed, less than is left where all is
// consumed at once.
func (c *Conn) Low() bool { return c.recvWin < c.muchCredit()/2 }

// muchCredit is how much credit is told whatever the peer has left, in bytes.
func (c *Conn) muchCredit() int64 { return min(int64(c.cfg.ConnWindow)/4, c.underWay/2) }

// Grow lets the peer send n bytes more on the connection than before, at once or as BoundUnderWay allows.
func (c *Conn) Grow(n int) {
	if c.err == nil {
		c.cfg.ConnWindow += n
		c.giveConn(int64(n))
	}
}

// BoundUnderWay lets the peer have at most n bytes on their way here. What has come and is not Consumed takes none of
// them, as long as the connection's window is larger by so much: a small message does not wait behind more than this,
// and one stream that is not read does not stop the others.
func (c *Conn) BoundUnderWay(n int) {
	if c.err == nil {
		c.underWay = int64(n)
		c.tellCredit()
	}
}

// headerBlock encodes fields behind a HEADERS frame (and CONTINUATIONs) of stream id.
func (c *Conn) headerBlock(id uint32, end bool, fields []hpack.HeaderField) {
	c.hbuf.Reset()
	for _, f := range fields {
		_ = c.henc.WriteField(f) // a bytes.Buffer takes all
	}
	typ, flags := byte(frameHeaders), byte(0)
	if end {
		flags = flagEndStream
	}
	for b := c.hbuf.Bytes(); ; {
		n := min(len(b), c.peerFrame)
		if n == len(b) {
			flags |= flagEndHeaders
		}
		c.out = append(appendHeader(c.out, n, typ, flags, id), b[:n]...)
		if b = b[n:]; len(b) == 0 {
			break
		}
		typ, flags = frameContinuation, 0
	}
	if c.hbuf.Cap() > 4096 {
		c.hbuf = bytes.Buffer{}
	}
}
