package tlsrecord

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	mrand "math/rand/v2"
	"testing"
)

// moved is what a Conn becomes in another process.
func moved(t *testing.T, c *Conn) *Conn {
	t.Helper()
	state, err := c.Export()
	if err != nil {
		t.Fatal(err)
	}
	c.Clear()
	value, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	state.Clear()
	var got State
	if err := json.Unmarshal(value, &got); err != nil {
		t.Fatal(err)
	}
	next, err := Import(got)
	if err != nil {
		t.Fatal(err)
	}
	return next
}

// TestHandoverAgainstCryptoTLS moves a connection between its records, key updates among them, while crypto/tls is at
// its other end.
func TestHandoverAgainstCryptoTLS(t *testing.T) {
	for name, server := range map[string]bool{"client": false, "server": true} {
		t.Run(name, func(t *testing.T) {
			s, peer := against(t, server)
			want := make([]byte, 1<<20)
			rand.Read(want)
			go func() {
				for rest := want; len(rest) > 0; {
					n := min(len(rest), 1+mrand.IntN(5000))
					peer.Write(rest[:n])
					rest = rest[n:]
				}
				peer.CloseWrite()
			}()
			var got []byte
			for {
				p, err := s.read()
				got = append(got, p...)
				if err != nil {
					break
				}
				s.Conn = moved(t, s.Conn)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("got %d bytes", len(got))
			}
		})
	}
}

func TestHandoverOfBothSides(t *testing.T) {
	for _, suite := range []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256} {
		a, b := pair(t, suite)
		for i := range 200 {
			buf := make([]byte, HeaderLen+10+TailLen)
			copy(buf[HeaderLen:], "0123456789")
			if i%7 == 0 {
				up, err := a.AppendKeyUpdate(nil, true)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := b.Open(up); err != nil {
					t.Fatal(err)
				}
			}
			a.Seal(buf, 10)
			if i%3 == 0 {
				a = moved(t, a)
			}
			if i%4 == 0 {
				b = moved(t, b)
			}
			if p, err := b.Open(buf); err != nil || string(p) != "0123456789" {
				t.Fatalf("record %d: %q, %v", i, p, err)
			}
			if b.UpdateDue() != (i >= 0) {
				t.Fatal("the update that is owed was forgotten")
			}
		}
	}
}

func FuzzImport(f *testing.F) {
	f.Add([]byte(`{"Suite":4865,"In":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","Out":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","InSeq":3}`), []byte("record"))
	f.Fuzz(func(t *testing.T, value, in []byte) {
		var s State
		if json.Unmarshal(value, &s) != nil {
			return
		}
		c, err := Import(s)
		if err != nil {
			return
		}
		if n, err := c.Length(in); err == nil && n > 0 && n <= len(in) {
			_, _ = c.Open(in[:n])
		}
		_, _ = c.AppendKeyUpdate(nil, false)
	})
}
