package machine

import (
	"bytes"
	"testing"
	"time"
)

// chop splits b at places that the fuzzer chooses.
func chop(b, cuts []byte, f func([]byte) bool) {
	for i := 0; len(b) > 0; i++ {
		n := len(b)
		if len(cuts) > 0 {
			n = min(n, 1+int(cuts[i%len(cuts)]))
		}
		if !f(b[:n]) {
			return
		}
		b = b[n:]
	}
}

// hostile feeds bytes of the fuzzer to c and checks what must hold whatever they are.
func hostile(t *testing.T, c *Conn, in, cuts []byte) {
	open := map[*Stream]bool{}
	chop(in, cuts, func(b []byte) bool {
		c.Advance(time.Duration(len(b)) * time.Millisecond)
		evs, err := feed(c, b)
		for _, ev := range evs {
			switch ev.Kind {
			case Request:
				if open[ev.Stream] || ev.Authority == "" {
					t.Fatal("a stream opened twice or without an authority")
				}
				open[ev.Stream] = true
				ev.Stream.Answer(200, nil, false)
			case Data:
				ev.Stream.Consumed(len(ev.Data) / 2)
				if len(ev.Data)%3 == 0 {
					ev.Stream.Reset(CodeCancel)
				}
			}
		}
		if c.recvWin < 0 || c.recvWin+c.credit > int64(c.cfg.ConnWindow) {
			t.Fatalf("connection window %d, credit %d", c.recvWin, c.credit)
		}
		if len(c.Output()) > maxOutput+1<<20 {
			t.Fatalf("%d bytes of answers wait", len(c.Output()))
		}
		if c.Streams() > c.cfg.MaxStreams {
			t.Fatalf("%d streams", c.Streams())
		}
		for _, s := range c.streams {
			if s.recvWin < 0 || s.held < 0 || s.gone {
				t.Fatalf("stream %+v", s)
			}
		}
		return err == nil
	})
}

func FuzzServer(f *testing.F) {
	p := newPeer(false)
	p.connect(1, "baggage", "a=b")
	p.WriteDataPadded(1, false, []byte("data"), make([]byte, 9))
	p.WriteWindowUpdate(1, 100)
	p.WritePing(false, [8]byte{})
	p.WriteRawFrame(frameHeaders, 0, 3, p.block(":method", "CONNECT"))
	p.WriteContinuation(3, true, p.block(":authority", "x:1"))
	p.WriteRSTStream(1, 8)
	p.WriteData(3, true, nil)
	p.WriteGoAway(0, 0, nil)
	f.Add(bytes.TrimPrefix(p.Bytes(), []byte(preface)), []byte{0, 3, 200})
	f.Fuzz(func(t *testing.T, in, cuts []byte) {
		c := New(testConfig(true))
		hostile(t, c, append([]byte(preface), in...), cuts)
	})
}

func FuzzClient(f *testing.F) {
	p := newPeer(true)
	p.WriteRawFrame(frameHeaders, flagEndHeaders, 1, p.block(":status", "200"))
	p.WriteData(1, false, []byte("data"))
	p.WriteRawFrame(frameHeaders, flagEndHeaders|flagEndStream, 3, p.block(":status", "503"))
	p.WriteGoAway(3, 0, nil)
	f.Add(p.Bytes(), []byte{7})
	f.Fuzz(func(t *testing.T, in, cuts []byte) {
		c := New(testConfig(false))
		for range 4 {
			if _, err := c.Connect("a:1", nil); err != nil {
				t.Fatal(err)
			}
		}
		hostile(t, c, in, cuts)
	})
}

// end is one side of FuzzPair with what it sent and got on each stream.
type end struct {
	c    *Conn
	wire []byte // on its way to this end
	to   *end
	st   map[uint32]*flow
	ids  []uint32
}

type flow struct {
	s         *Stream
	sent, got []byte
	unread    int
	ended     bool // by the other end
	reset     bool
}

// push moves up to n bytes of what this end puts out onto the wire.
func (e *end) push(n int) {
	b := e.c.Output()
	n = min(n, len(b))
	e.to.wire = append(e.to.wire, b[:n]...)
	e.c.Flushed(n)
}

// write sends up to n bytes on f. Payload may go only when all control frames are out.
func (e *end) write(f *flow, n int, fin bool) {
	e.push(1 << 30)
	n = min(n, f.s.Budget())
	if f.s.Gone() || f.s.SentEnd() || n == 0 && !fin {
		return
	}
	h := make([]byte, HeaderLen)
	f.s.DataHeader(h, n, fin)
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(len(f.sent) + i + int(f.s.ID()))
	}
	f.sent = append(f.sent, p...)
	e.to.wire = append(append(e.to.wire, h...), p...)
}

// pull takes up to n bytes off the wire.
func (e *end) pull(t *testing.T, n int) {
	n = min(n, len(e.wire))
	evs, err := feed(e.c, e.wire[:n])
	if err != nil {
		t.Fatal(err)
	}
	e.wire = e.wire[n:]
	for _, ev := range evs {
		switch ev.Kind {
		case Request:
			e.st[ev.Stream.ID()] = &flow{s: ev.Stream}
			e.ids = append(e.ids, ev.Stream.ID())
			ev.Stream.Answer(200, nil, false)
		case Data:
			f := e.st[ev.Stream.ID()]
			f.got = append(f.got, ev.Data...)
			f.unread += len(ev.Data)
			f.ended = f.ended || ev.End
		case Reset:
			f := e.st[ev.Stream.ID()]
			f.reset, f.unread = true, 0
		}
	}
}

// FuzzPair lets a client and a server talk over a wire that cuts where the fuzzer says, and checks that every byte
// arrives and every window is whole in the end.
func FuzzPair(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 8, 1, 255, 9, 2, 200, 4, 1, 12, 3, 5, 0, 13, 1, 20, 0, 33, 7, 2, 2, 6, 3, 22, 22, 7, 1})
	f.Fuzz(func(t *testing.T, script []byte) {
		small := func(server bool) Config {
			c := testConfig(server)
			c.StreamWindow, c.ConnWindow = 65535, 100000
			return c
		}
		cl := &end{c: New(small(false)), st: map[uint32]*flow{}}
		sv := &end{c: New(small(true)), st: map[uint32]*flow{}}
		cl.to, sv.to = sv, cl
		for now := time.Duration(0); len(script) >= 2 && now < 500; now++ {
			op, arg := script[0], int(script[1])
			script = script[2:]
			e := cl
			if op&8 != 0 {
				e = sv
			}
			e.c.Advance(now * time.Second)
			if op&7 == 0 && e == sv {
				e.c.Grow(1 + arg)
				continue
			}
			if op&7 == 0 {
				if s, err := cl.c.Connect("a:1", nil); err == nil {
					cl.st[s.ID()] = &flow{s: s}
					cl.ids = append(cl.ids, s.ID())
				}
				continue
			}
			e.step(t, op&7, arg)
		}
		settle(t, cl, sv)
	})
}

// step does one thing of the script on one of the end's streams.
func (e *end) step(t *testing.T, op byte, arg int) {
	switch op {
	case 1:
		e.push(arg * 4)
		return
	case 2:
		e.pull(t, arg*100)
		return
	}
	if len(e.ids) == 0 {
		return
	}
	f := e.st[e.ids[arg%len(e.ids)]]
	switch op {
	case 3, 4:
		e.write(f, arg*100, false)
	case 5:
		e.write(f, arg, true)
	case 6:
		f.s.Consumed(f.unread)
		f.unread = 0
	case 7:
		if arg%4 == 0 {
			f.reset, f.unread = true, 0
			f.s.Reset(CodeCancel)
		}
	}
}

// settle delivers all that is under way and checks the books.
func settle(t *testing.T, cl, sv *end) {
	for i := range 10000 {
		if i > 0 && len(cl.wire)+len(sv.wire)+len(cl.c.Output())+len(sv.c.Output()) == 0 {
			break
		}
		for _, e := range []*end{cl, sv} {
			e.push(1 << 30)
			e.pull(t, 1<<30)
			for _, f := range e.st {
				f.s.Consumed(f.unread)
				f.unread = 0
			}
		}
	}
	for _, e := range []*end{cl, sv} {
		for id, f := range e.st {
			o := e.to.st[id]
			if o == nil || f.reset || o.reset {
				continue
			}
			if !bytes.Equal(f.got, o.sent) {
				t.Fatalf("stream %d: got %d bytes of %d", id, len(f.got), len(o.sent))
			}
			if f.ended != o.s.SentEnd() {
				t.Fatalf("stream %d: ended %v, other side %v", id, f.ended, o.s.SentEnd())
			}
		}
		if whole := e.c.recvWin + e.c.credit; whole != int64(e.c.cfg.ConnWindow) {
			t.Fatalf("the connection's window has lost %d bytes", int64(e.c.cfg.ConnWindow)-whole)
		}
		if e.c.recvWin != e.to.c.sendWin {
			t.Fatalf("one side counts a window of %d, the other of %d", e.c.recvWin, e.to.c.sendWin)
		}
	}
}
