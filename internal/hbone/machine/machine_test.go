package machine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

func testConfig(server bool) Config {
	return Config{Server: server, StreamWindow: 4 << 20, ConnWindow: 16 << 20, MaxFrame: 1 << 20, MaxHeaderList: 32 << 10, MaxStreams: 100}
}

// peer writes frames of golang.org/x/net/http2 into a buffer.
type peer struct {
	bytes.Buffer
	*http2.Framer
	henc *hpack.Encoder
	hbuf bytes.Buffer
}

func newPeer(server bool) *peer {
	p := &peer{}
	p.Framer = http2.NewFramer(&p.Buffer, nil)
	p.AllowIllegalWrites = true
	p.henc = hpack.NewEncoder(&p.hbuf)
	if !server {
		p.WriteString(preface)
	}
	p.WriteSettings()
	return p
}

func (p *peer) block(kv ...string) []byte {
	p.hbuf.Reset()
	for i := 0; i < len(kv); i += 2 {
		p.henc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
	}
	return bytes.Clone(p.hbuf.Bytes())
}

func (p *peer) connect(id uint32, more ...string) {
	p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true,
		BlockFragment: p.block(append([]string{":method", "CONNECT", ":authority", "10.0.0.1:80"}, more...)...)})
}

// feed gives all of in to c and collects the events, with copies of their data.
func feed(c *Conn, in []byte) (evs []Event, err error) {
	for {
		ev, n, err := c.Next(in)
		in = in[n:]
		if err != nil {
			return evs, err
		}
		if ev.Kind == None {
			return evs, nil
		}
		ev.Data = bytes.Clone(ev.Data)
		evs = append(evs, ev)
	}
}

// sent parses what c has put out, in short.
func sent(t testing.TB, c *Conn) (out []string) {
	t.Helper()
	b := bytes.TrimPrefix(bytes.Clone(c.Output()), []byte(preface))
	c.Flushed(len(c.Output()))
	fr := http2.NewFramer(nil, bytes.NewReader(b))
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return out
		}
		switch f := f.(type) {
		case *http2.RSTStreamFrame:
			out = append(out, "RST_STREAM "+f.ErrCode.String())
		case *http2.GoAwayFrame:
			out = append(out, "GOAWAY "+f.ErrCode.String())
		default:
			out = append(out, f.Header().Type.String())
		}
	}
}

// TestHostileClients gives a server what a client must not send: each costs the connection or only the stream.
func TestHostileClients(t *testing.T) {
	u32 := func(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
	flood := func(n int, f func(p *peer, i int)) func(p *peer) {
		return func(p *peer) {
			for i := range n {
				f(p, i)
			}
		}
	}
	tests := map[string]struct {
		send func(p *peer)
		code uint32 // of the connection's end; CodeNo = it stands
		last string // the last frame put out
	}{
		"HTTP/1":                  {func(p *peer) { p.Reset(); p.WriteString("GET / HTTP/1.1\r\n\r\n") }, CodeProtocol, ""},
		"no SETTINGS":             {func(p *peer) { p.Reset(); p.WriteString(preface); p.WritePing(false, [8]byte{}) }, CodeProtocol, ""},
		"even stream":             {func(p *peer) { p.connect(2) }, CodeProtocol, ""},
		"stream 0":                {func(p *peer) { p.connect(0) }, CodeProtocol, ""},
		"frame too long":          {func(p *peer) { p.Write([]byte{0x20, 0, 0, 0, 0, 0, 0, 0, 1}) }, CodeFrameSize, ""},
		"SETTINGS too long":       {func(p *peer) { p.WriteRawFrame(frameSettings, 0, 0, make([]byte, 6000)) }, CodeFrameSize, ""},
		"SETTINGS odd length":     {func(p *peer) { p.WriteRawFrame(frameSettings, 0, 0, make([]byte, 5)) }, CodeFrameSize, ""},
		"SETTINGS on a stream":    {func(p *peer) { p.WriteRawFrame(frameSettings, 0, 1, nil) }, CodeProtocol, ""},
		"SETTINGS ack with load":  {func(p *peer) { p.WriteRawFrame(frameSettings, flagAck, 0, make([]byte, 6)) }, CodeFrameSize, ""},
		"window setting":          {func(p *peer) { p.WriteSettings(http2.Setting{ID: 4, Val: 1 << 31}) }, CodeFlowControl, ""},
		"frame setting":           {func(p *peer) { p.WriteSettings(http2.Setting{ID: 5, Val: 100}) }, CodeProtocol, ""},
		"push setting":            {func(p *peer) { p.WriteSettings(http2.Setting{ID: 2, Val: 2}) }, CodeProtocol, ""},
		"PUSH_PROMISE":            {func(p *peer) { p.WriteRawFrame(framePush, 0, 1, make([]byte, 8)) }, CodeProtocol, ""},
		"PING on a stream":        {func(p *peer) { p.WriteRawFrame(framePing, 0, 1, make([]byte, 8)) }, CodeProtocol, ""},
		"PING too short":          {func(p *peer) { p.WriteRawFrame(framePing, 0, 0, make([]byte, 7)) }, CodeFrameSize, ""},
		"GOAWAY too short":        {func(p *peer) { p.WriteRawFrame(frameGoAway, 0, 0, make([]byte, 7)) }, CodeProtocol, ""},
		"PRIORITY too short":      {func(p *peer) { p.WriteRawFrame(framePriority, 0, 1, make([]byte, 4)) }, CodeProtocol, ""},
		"DATA on stream 0":        {func(p *peer) { p.WriteRawFrame(frameData, 0, 0, []byte("x")) }, CodeProtocol, ""},
		"DATA on idle stream":     {func(p *peer) { p.WriteData(5, false, []byte("x")) }, CodeProtocol, ""},
		"DATA after end":          {func(p *peer) { p.connect(1); p.WriteData(1, true, nil); p.WriteData(1, false, []byte("x")) }, CodeStreamClosed, ""},
		"padding without length":  {func(p *peer) { p.connect(1); p.WriteRawFrame(frameData, flagPadded, 1, nil) }, CodeFrameSize, ""},
		"more padding than DATA":  {func(p *peer) { p.connect(1); p.WriteRawFrame(frameData, flagPadded, 1, []byte{2, 0}) }, CodeProtocol, ""},
		"more padding than block": {func(p *peer) { p.WriteRawFrame(frameHeaders, flagPadded|flagEndHeaders, 1, []byte{9, 0}) }, CodeProtocol, ""},
		"HEADERS cut short":       {func(p *peer) { p.WriteRawFrame(frameHeaders, flagPriority|flagEndHeaders, 1, []byte{0, 0}) }, CodeFrameSize, ""},
		"bad header block": {func(p *peer) {
			p.WriteRawFrame(frameHeaders, flagEndHeaders, 1, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
		}, CodeCompression, ""},
		"block cut short":         {func(p *peer) { p.WriteRawFrame(frameHeaders, flagEndHeaders, 1, []byte{0x40, 10, 'a'}) }, CodeCompression, ""},
		"block interrupted":       {func(p *peer) { p.WriteRawFrame(frameHeaders, 0, 1, nil); p.WritePing(false, [8]byte{}) }, CodeProtocol, ""},
		"block of another":        {func(p *peer) { p.WriteRawFrame(frameHeaders, 0, 1, nil); p.WriteContinuation(3, true, nil) }, CodeProtocol, ""},
		"CONTINUATION of nothing": {func(p *peer) { p.WriteContinuation(1, true, nil) }, CodeProtocol, ""},
		"CONTINUATION flood": {func(p *peer) {
			p.WriteRawFrame(frameHeaders, 0, 1, nil)
			flood(30000, func(p *peer, _ int) { p.WriteContinuation(1, false, nil) })(p)
		}, CodeCalm, ""},
		"CONTINUATION bomb": {func(p *peer) {
			p.WriteRawFrame(frameHeaders, 0, 1, nil)
			flood(10, func(p *peer, _ int) { p.WriteContinuation(1, false, make([]byte, 10000)) })(p)
		}, CodeCalm, ""},
		"WINDOW_UPDATE by 0":       {func(p *peer) { p.WriteRawFrame(frameWindowUpdate, 0, 0, u32(0)) }, CodeProtocol, ""},
		"connection window":        {func(p *peer) { p.WriteWindowUpdate(0, 1<<31-1) }, CodeFlowControl, ""},
		"WINDOW_UPDATE too long":   {func(p *peer) { p.WriteRawFrame(frameWindowUpdate, 0, 0, make([]byte, 5)) }, CodeFrameSize, ""},
		"WINDOW_UPDATE of idle":    {func(p *peer) { p.WriteWindowUpdate(7, 1) }, CodeProtocol, ""},
		"RST_STREAM of idle":       {func(p *peer) { p.WriteRSTStream(7, 0) }, CodeProtocol, ""},
		"RST_STREAM too short":     {func(p *peer) { p.connect(1); p.WriteRawFrame(frameReset, 0, 1, []byte{0}) }, CodeFrameSize, ""},
		"rapid reset":              {flood(2000, func(p *peer, i int) { p.connect(uint32(2*i + 1)); p.WriteRSTStream(uint32(2*i+1), 8) }), CodeCalm, ""},
		"stream flood":             {flood(2000, func(p *peer, i int) { p.connect(uint32(2*i + 1)) }), CodeCalm, ""},
		"PING flood":               {flood(30000, func(p *peer, _ int) { p.WritePing(false, [8]byte{}) }), CodeCalm, ""},
		"SETTINGS flood":           {flood(1000, func(p *peer, _ int) { p.WriteSettings() }), CodeCalm, ""},
		"empty DATA flood":         {func(p *peer) { p.connect(1); flood(30000, func(p *peer, _ int) { p.WriteData(1, false, nil) })(p) }, CodeCalm, ""},
		"PRIORITY flood":           {flood(30000, func(p *peer, _ int) { p.WriteRawFrame(framePriority, 0, 1, make([]byte, 5)) }), CodeCalm, ""},
		"unknown frame flood":      {flood(30000, func(p *peer, _ int) { p.WriteRawFrame(77, 0, 1, make([]byte, 5)) }), CodeCalm, ""},
		"GOAWAY flood":             {flood(1000, func(p *peer, _ int) { p.WriteGoAway(0, 0, nil) }), CodeCalm, ""},
		"more streams than agreed": {flood(101, func(p *peer, i int) { p.connect(uint32(2*i + 1)) }), CodeNo, "RST_STREAM REFUSED_STREAM"},
		"stream window":            {func(p *peer) { p.connect(1); p.WriteWindowUpdate(1, 1<<31-1) }, CodeNo, "RST_STREAM FLOW_CONTROL_ERROR"},
		"stream update by 0":       {func(p *peer) { p.connect(1); p.WriteRawFrame(frameWindowUpdate, 0, 1, u32(0)) }, CodeNo, "RST_STREAM PROTOCOL_ERROR"},
		"header list too long":     {func(p *peer) { p.connect(1, flatten(strings.Repeat("x", 1000), 33)...) }, CodeNo, "RST_STREAM NO_ERROR"},
		"too many fields":          {func(p *peer) { p.connect(1, flatten("x", 200)...) }, CodeNo, "RST_STREAM NO_ERROR"},
		"header bomb":              {func(p *peer) { p.connect(1, flatten(strings.Repeat("y", 3000), 5000)...) }, CodeNo, "RST_STREAM NO_ERROR"},
		"GET": {func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: p.block(":method", "GET", ":path", "/", ":scheme", "https")})
		}, CodeNo, "RST_STREAM NO_ERROR"},
		"no authority": {func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: p.block(":method", "CONNECT")})
		}, CodeNo, "RST_STREAM PROTOCOL_ERROR"},
		"extended CONNECT": {func(p *peer) {
			p.connect(1)
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, EndHeaders: true, BlockFragment: p.block(":method", "CONNECT", ":protocol", "websocket", ":authority", "a")})
		}, CodeNo, "RST_STREAM PROTOCOL_ERROR"},
		"upper case":         {func(p *peer) { p.connect(1, "Forwarded", "x") }, CodeNo, "RST_STREAM PROTOCOL_ERROR"},
		"late pseudo-header": {func(p *peer) { p.connect(1, "a", "b", ":path", "/") }, CodeNo, "RST_STREAM PROTOCOL_ERROR"},
		"trailers with a status": {func(p *peer) {
			p.connect(1)
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, EndStream: true, BlockFragment: p.block(":status", "200")})
		}, CodeNo, "RST_STREAM PROTOCOL_ERROR"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := New(testConfig(true))
			p := newPeer(false)
			tt.send(p)
			_, err := feed(c, p.Bytes())
			var ce *ConnError
			if errors.As(err, &ce) != (tt.code != CodeNo) || ce != nil && ce.Code != tt.code {
				t.Fatalf("got %v, want code %d", err, tt.code)
			}
			out := sent(t, c)
			if tt.code != CodeNo {
				tt.last = "GOAWAY " + http2.ErrCode(tt.code).String()
				if _, _, again := c.Next([]byte("more")); again != err {
					t.Errorf("the error is not final: %v", again)
				}
			}
			if len(out) == 0 || out[len(out)-1] != tt.last {
				t.Errorf("put out %v, want %s at the end", out[max(0, len(out)-5):], tt.last)
			}
		})
	}
}

func flatten(v string, n int) (kv []string) {
	for range n {
		kv = append(kv, "baggage", v)
	}
	return kv
}

// TestWindowsAreKept gives a server more DATA than it offered.
func TestWindowsAreKept(t *testing.T) {
	cfg := testConfig(true)
	cfg.StreamWindow, cfg.ConnWindow = 100000, 150000
	for name, tt := range map[string]struct {
		frames [][2]int // stream, bytes
		code   uint32
	}{
		"all of a stream's":      {[][2]int{{1, 100000}}, CodeNo},
		"more than a stream's":   {[][2]int{{1, 100000}, {1, 1}}, CodeFlowControl},
		"all of the connection":  {[][2]int{{1, 100000}, {3, 50000}}, CodeNo},
		"more than the whole":    {[][2]int{{1, 100000}, {3, 50001}}, CodeFlowControl},
		"more in a single frame": {[][2]int{{1, 100001}}, CodeFlowControl},
	} {
		c := New(cfg)
		p := newPeer(false)
		p.connect(1)
		p.connect(3)
		for _, f := range tt.frames {
			p.WriteRawFrame(frameData, 0, uint32(f[0]), make([]byte, f[1]))
		}
		_, err := feed(c, p.Bytes())
		var ce *ConnError
		if errors.As(err, &ce) != (tt.code != CodeNo) || ce != nil && ce.Code != tt.code {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRequestInPieces(t *testing.T) {
	p := newPeer(false)
	p.WriteRawFrame(77, 0, 3, []byte("of a type that no one knows"))
	b := p.block(":method", "CONNECT", ":authority", "svc:80", "forwarded", "for=a", "baggage", strings.Repeat("k=v,", 3000))
	p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:3], PadLength: 7, Priority: http2.PriorityParam{Weight: 3}})
	p.WriteContinuation(1, false, b[3:100])
	p.WriteContinuation(1, false, nil)
	p.WriteContinuation(1, true, b[100:])
	p.WriteDataPadded(1, false, []byte("hello "), make([]byte, 200))
	p.WriteDataPadded(1, false, nil, make([]byte, 100))
	p.WriteDataPadded(1, true, []byte("world"), make([]byte, 1))
	want := []Event{{Kind: Request, Authority: "svc:80", Header: []hpack.HeaderField{{Name: "forwarded", Value: "for=a"},
		{Name: "baggage", Value: strings.Repeat("k=v,", 3000)}}}}
	for cut := 1; cut < 400; cut = cut*3/2 + 1 {
		c := New(testConfig(true))
		var got []Event
		var data []byte
		ended := false
		for in := p.Bytes(); len(in) > 0; in = in[min(cut, len(in)):] {
			evs, err := feed(c, in[:min(cut, len(in))])
			if err != nil {
				t.Fatal(err)
			}
			for _, ev := range evs {
				switch ev.Kind {
				case Data:
					data = append(data, ev.Data...)
					ended = ended || ev.End
					ev.Stream.Consumed(len(ev.Data))
				case Request:
					ev.Stream = nil
					got = append(got, ev)
				}
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Fatalf("cut at %d: %s", cut, d)
		}
		if string(data) != "hello world" || !ended {
			t.Errorf("cut at %d: data %q, ended %v", cut, data, ended)
		}
		if whole := c.recvWin + c.credit; whole != 16<<20 {
			t.Errorf("cut at %d: the connection's window has lost %d bytes", cut, 16<<20-whole)
		}
	}
}

func TestClientOfHostileServers(t *testing.T) {
	for name, tt := range map[string]struct {
		send func(p *peer)
		code uint32
		kind Kind // of the last event
	}{
		"answer to nothing": {func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 9, EndHeaders: true, BlockFragment: p.block(":status", "200")})
		}, CodeProtocol, Writable},
		"no status": {func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: p.block("a", "b")})
		}, CodeNo, Reset},
		"status is no number": {func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: p.block(":status", "ok")})
		}, CodeNo, Reset},
		"informational": {func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: p.block(":status", "103")})
		}, CodeNo, Writable},
		"refused by GOAWAY":   {func(p *peer) { p.WriteGoAway(0, 0, nil) }, CodeNo, Reset},
		"push is switched on": {func(p *peer) { p.WriteSettings(http2.Setting{ID: 2, Val: 1}) }, CodeProtocol, Writable},
		"window shrinks":      {func(p *peer) { p.WriteSettings(http2.Setting{ID: 4, Val: 0}) }, CodeNo, Writable},
		"window grows too wide": {func(p *peer) {
			p.WriteWindowUpdate(1, 1<<31-1-65535)
			p.WriteSettings(http2.Setting{ID: 4, Val: 65536})
		}, CodeFlowControl, Writable},
	} {
		t.Run(name, func(t *testing.T) {
			c := New(testConfig(false))
			if _, err := c.Connect("a:1", nil); err != nil {
				t.Fatal(err)
			}
			p := newPeer(true)
			tt.send(p)
			evs, err := feed(c, p.Bytes())
			var ce *ConnError
			if errors.As(err, &ce) != (tt.code != CodeNo) || ce != nil && ce.Code != tt.code {
				t.Fatalf("got %v, want code %d", err, tt.code)
			}
			if k := evs[len(evs)-1].Kind; k != tt.kind {
				t.Errorf("last event %d, want %d", k, tt.kind)
			}
		})
	}
}

func TestLimitsOfThePeer(t *testing.T) {
	c := New(testConfig(false))
	p := newPeer(true)
	p.WriteSettings(http2.Setting{ID: 3, Val: 1}, http2.Setting{ID: 4, Val: 10}, http2.Setting{ID: 5, Val: 20000})
	if _, err := feed(c, p.Bytes()); err != nil {
		t.Fatal(err)
	}
	s, err := c.Connect("a:1", []hpack.HeaderField{{Name: "baggage", Value: strings.Repeat("\x01", 50000)}})
	if err != nil {
		t.Fatal(err)
	}
	if got := sent(t, c); len(got) < 2 || got[len(got)-1] != "CONTINUATION" {
		t.Errorf("a long header list went out as %v", got)
	}
	if _, err := c.Connect("a:1", nil); err != ErrFull {
		t.Errorf("second stream: %v", err)
	}
	if b := s.Budget(); b != 10 {
		t.Errorf("budget %d, want the peer's 10", b)
	}
	c.GoAway()
	if _, err := c.Connect("a:1", nil); err != ErrDraining {
		t.Errorf("stream after GOAWAY: %v", err)
	}
}

func TestBudgetFillsUpWithTime(t *testing.T) {
	c := New(testConfig(true))
	p := newPeer(false)
	feed(c, p.Bytes())
	for i := range 100 { // twice the rate would be too much; this is a tenth
		p.Reset()
		for range 1000 {
			p.WritePing(false, [8]byte{})
		}
		c.Advance(time.Duration(i) * time.Second)
		if _, err := feed(c, p.Bytes()); err != nil {
			t.Fatalf("second %d: %v", i, err)
		}
		c.Flushed(len(c.Output()))
	}
}

// TestUnderWayIsBounded: a peer may have only so much on its way here, while what has come and is not consumed takes none
// of that as long as the connection's window is larger.
func TestUnderWayIsBounded(t *testing.T) {
	const bound = 1 << 20
	cfg := testConfig(true)
	c := New(cfg)
	c.Flushed(len(c.Output()))
	c.recvWin, c.credit = 65535, 16<<20-65535
	c.BoundUnderWay(bound)
	if c.recvWin != bound {
		t.Errorf("the peer may send %d bytes, want %d", c.recvWin, bound)
	}
	held, sent := int64(0), int64(0)
	s := c.newStream(1)
	s.recvWin = 64 << 20
	for range 15 { // nothing of it is consumed
		c.recvWin -= bound / 2
		held, sent = held+bound/2, sent+bound/2
		s.held += bound / 2
		c.tellCredit()
		if c.recvWin != bound {
			t.Fatalf("after %d bytes the peer may send %d, want %d", sent, c.recvWin, bound)
		}
	}
	if whole := c.recvWin + c.credit + held; whole != 16<<20 {
		t.Errorf("the connection's window is %d bytes", whole)
	}
	s.Consumed(int(held))
	if whole := c.recvWin + c.credit; whole != 16<<20 || c.recvWin != bound {
		t.Errorf("all consumed: the peer may send %d bytes of %d", c.recvWin, whole)
	}
}

// TestUnreadStreamsLeaveTheRest has a stream whose bytes nobody takes hold most of the window: others go on with what is
// left of it for as long as theirs are taken.
func TestUnreadStreamsLeaveTheRest(t *testing.T) {
	const window, held, message = 256 << 10, 224 << 10, 1 << 10
	cfg := testConfig(true)
	cfg.ConnWindow = window
	c := New(cfg)
	p := newPeer(false)
	p.connect(1)
	p.connect(3)
	p.WriteRawFrame(frameData, 0, 1, make([]byte, held))
	if _, err := feed(c, p.Bytes()); err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		if c.recvWin < message {
			t.Fatalf("after %d messages the peer may send %d bytes", i, c.recvWin)
		}
		p.Reset()
		p.WriteRawFrame(frameData, 0, 3, make([]byte, message))
		if _, err := feed(c, p.Bytes()); err != nil {
			t.Fatal(err)
		}
		c.streams[3].Consumed(message)
	}
	if whole := c.recvWin + c.credit; whole != window-held {
		t.Errorf("the rest of the window is %d bytes", whole)
	}
}
