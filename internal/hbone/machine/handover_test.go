package machine

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2/hpack"
)

// handOver replaces the end's Conn by one that was made of its state.
func (e *end) handOver(t *testing.T) {
	t.Helper()
	var streams []*Stream
	for _, id := range e.ids {
		if s := e.st[id].s; !s.gone || s.held > 0 {
			streams = append(streams, s)
		}
	}
	state, err := e.c.Export(streams)
	if err != nil {
		t.Fatal(err)
	}
	wire, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	var got State
	if err := json.Unmarshal(wire, &got); err != nil {
		t.Fatal(err)
	}
	c, made, err := Import(got)
	if err != nil {
		t.Fatalf("%v\n%s", err, wire)
	}
	for i, s := range made {
		if s.ID() != streams[i].ID() {
			t.Fatalf("stream %d came as %d", streams[i].ID(), s.ID())
		}
		e.st[s.ID()].s = s
	}
	if diff := cmp.Diff(state.Table, c.decoderTable()); diff != "" {
		t.Fatalf("the table differs: %s", diff)
	}
	e.c = c
}

// TestHandover lets two ends talk, moves each of them from value to value at random points, in the middle of frames and
// header blocks too, and wants every byte and header to arrive and every window to be whole in the end.
func TestHandover(t *testing.T) {
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 0))
		small := func(server bool) Config {
			c := testConfig(server)
			c.StreamWindow, c.ConnWindow = 65535, 100000
			return c
		}
		cl := &end{c: New(small(false)), st: map[uint32]*flow{}}
		sv := &end{c: New(small(true)), st: map[uint32]*flow{}}
		cl.to, sv.to = sv, cl
		for now := range 400 {
			e := []*end{cl, sv}[r.IntN(2)]
			e.c.Advance(time.Duration(now) * time.Second)
			switch op := r.IntN(12); op {
			case 0:
				header := []hpack.HeaderField{{Name: fmt.Sprintf("x-%d", r.IntN(9)), Value: fmt.Sprint(r.IntN(5), "-of-some-length")}}
				if s, err := cl.c.Connect("a:1", header); err == nil {
					cl.st[s.ID()] = &flow{s: s}
					cl.ids = append(cl.ids, s.ID())
				}
			case 8, 9, 10:
				e.handOver(t)
			case 11:
				e.pull(t, 1+r.IntN(20))
			default:
				e.step(t, byte(op), r.IntN(256))
			}
		}
		settle(t, cl, sv)
	}
}

// TestHandoverHeaders wants the headers of CONNECTs before and after to be the same on the other side, although both
// ends' tables have entries by then.
func TestHandoverHeaders(t *testing.T) {
	cl, sv := &end{c: New(testConfig(false)), st: map[uint32]*flow{}}, &end{c: New(testConfig(true)), st: map[uint32]*flow{}}
	cl.to, sv.to = sv, cl
	for round := range 40 {
		want := []hpack.HeaderField{{Name: "baggage", Value: fmt.Sprintf("round=%d", round/2)}, {Name: "forwarded", Value: "for=10.0.0.1"}}
		if _, err := cl.c.Connect(fmt.Sprintf("10.0.0.%d:80", round%3), want); err != nil {
			t.Fatal(err)
		}
		evs, err := feed(sv.c, cl.c.Output())
		cl.c.Flushed(len(cl.c.Output()))
		if err != nil {
			t.Fatal(err)
		}
		last := evs[len(evs)-1]
		if diff := cmp.Diff(want, last.Header); last.Kind != Request || diff != "" {
			t.Fatalf("round %d: %+v %s", round, last, diff)
		}
		last.Stream.Reset(CodeCancel)
		if _, err := feed(cl.c, sv.c.Output()); err != nil {
			t.Fatal(err)
		}
		sv.c.Flushed(len(sv.c.Output()))
		if round%4 == 1 {
			cl.handOver(t)
		}
		if round%6 == 1 {
			sv.handOver(t)
		}
	}
}

// FuzzImport: what another process hands over gives an error or a Conn that holds out against any input.
func FuzzImport(f *testing.F) {
	c := New(testConfig(true))
	p := newPeer(false)
	p.connect(1, "baggage", "a=b")
	p.WriteDataPadded(1, false, []byte("data"), make([]byte, 9))
	evs, err := feed(c, p.Bytes()[:p.Len()-3])
	if err != nil {
		f.Fatal(err)
	}
	state, err := c.Export([]*Stream{evs[len(evs)-1].Stream})
	if err != nil {
		f.Fatal(err)
	}
	seed, err := json.Marshal(state)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed, p.Bytes()[p.Len()-3:])
	f.Fuzz(func(t *testing.T, value, in []byte) {
		var s State
		if json.Unmarshal(value, &s) != nil {
			return
		}
		c, streams, err := Import(s)
		if err != nil {
			return
		}
		for _, m := range streams {
			m.Window()
			m.Consumed(10)
		}
		for range 3 {
			evs, err := feed(c, in)
			for _, ev := range evs {
				if ev.Kind == Request {
					ev.Stream.Answer(200, nil, false)
				}
				if ev.Kind == Data {
					ev.Stream.Consumed(len(ev.Data))
				}
			}
			if err != nil {
				return
			}
		}
		_, _ = c.Connect("a:1", nil)
	})
}
