package tlsrecord

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"testing"
	"time"
)

func config(t testing.TB) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, InsecureSkipVerify: true,
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ClientAuth: tls.RequireAnyClientCert}
}

// side is a Conn over a net.Conn, for tests: whole records by blocking calls.
type side struct {
	*Conn
	nc  net.Conn
	buf []byte
}

func (s *side) read() ([]byte, error) {
	for {
		n, err := s.Length(s.buf)
		if err != nil {
			return nil, err
		}
		if n > 0 && len(s.buf) >= n {
			rec := s.buf[:n]
			s.buf = s.buf[n:]
			p, err := s.Open(rec)
			if err != nil || len(p) > 0 {
				return p, err
			}
			if s.UpdateDue() {
				b, err := s.AppendKeyUpdate(nil, false)
				if err != nil {
					return nil, err
				}
				s.nc.Write(b)
			}
			continue
		}
		b := make([]byte, 40000)
		k, err := s.nc.Read(b)
		s.buf = append(s.buf, b[:k]...)
		if err != nil {
			return nil, err
		}
	}
}

func (s *side) write(p []byte) {
	for len(p) > 0 {
		n := min(len(p), 1+mrand.IntN(MaxPlain))
		b := make([]byte, HeaderLen+n+TailLen)
		copy(b[HeaderLen:], p[:n])
		s.Seal(b, n)
		s.nc.Write(b)
		p = p[n:]
	}
}

// against makes a Conn whose peer is crypto/tls.
func against(t *testing.T, server bool) (*side, *tls.Conn) {
	t.Helper()
	cfg := config(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	peer := tls.Server(b, cfg)
	if server {
		peer = tls.Client(b, cfg)
	}
	done := make(chan error, 1)
	go func() {
		err := peer.Handshake()
		if err == nil {
			_, err = peer.Write([]byte("at once")) // rides behind the last flight
		}
		done <- err
	}()
	chosen := cfg
	if server {
		chosen = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return cfg, nil }}
	}
	c, st, early, err := Handshake(context.Background(), a, chosen, server)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if len(st.PeerCertificates) != 1 || st.NegotiatedProtocol != "h2" {
		t.Errorf("state %+v", st)
	}
	s := &side{Conn: c, nc: a, buf: early}
	if p, err := s.read(); err != nil || string(p) != "at once" {
		t.Fatalf("first data %q, %v", p, err)
	}
	return s, peer
}

// TestSecretsCome fails if crypto/tls stops giving the traffic secrets by its key log, on which all of this stands.
func TestSecretsCome(t *testing.T) {
	for _, server := range []bool{false, true} {
		s, _ := against(t, server)
		if len(s.in.secret) == 0 || len(s.out.secret) == 0 {
			t.Error("no secrets")
		}
	}
}

func TestAgainstCryptoTLS(t *testing.T) {
	for name, server := range map[string]bool{"client": false, "server": true} {
		t.Run(name, func(t *testing.T) {
			s, peer := against(t, server)
			want := make([]byte, 3<<20)
			rand.Read(want)
			go func() {
				for i := 0; i < len(want); i += 1 << 20 {
					s.write(want[i : i+1<<20])
					b, err := s.AppendKeyUpdate(nil, false)
					if err != nil {
						t.Error(err)
					}
					s.nc.Write(b)
				}
				s.nc.Write(s.AppendAlert(nil, io.EOF))
			}()
			got, err := io.ReadAll(peer) // an EOF that is not close_notify would be an error
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("crypto/tls got %d bytes, %v", len(got), err)
			}
			go func() { peer.Write(want); peer.CloseWrite() }()
			got = nil
			for {
				var p []byte
				if p, err = s.read(); err != nil {
					break
				}
				got = append(got, p...)
			}
			if err != io.EOF || !bytes.Equal(got, want) {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}
}

// pair is two Conns of the same made-up secrets.
func pair(t testing.TB, suite uint16) (a, b *Conn) {
	t.Helper()
	n := 32
	if suite == tls.TLS_AES_256_GCM_SHA384 {
		n = 48
	}
	x, y := bytes.Repeat([]byte{1}, n), bytes.Repeat([]byte{2}, n)
	a, err := New(suite, bytes.Clone(x), bytes.Clone(y))
	if err != nil {
		t.Fatal(err)
	}
	b, err = New(suite, y, x)
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

func sealed(c *Conn, data []byte) []byte {
	b := make([]byte, HeaderLen+len(data)+TailLen)
	copy(b[HeaderLen:], data)
	c.Seal(b, len(data))
	return b
}

func TestSuitesAndKeyUpdates(t *testing.T) {
	for _, id := range []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256} {
		a, b := pair(t, id)
		for i := range 3 {
			for _, n := range []int{1, 100, MaxPlain} {
				data := bytes.Repeat([]byte{byte(i)}, n)
				if got, err := b.Open(sealed(a, data)); err != nil || !bytes.Equal(got, data) {
					t.Fatalf("%s, generation %d, %d bytes: %v", tls.CipherSuiteName(id), i, n, err)
				}
			}
			rec, err := a.AppendKeyUpdate(nil, false)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := b.Open(rec); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := New(tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, nil, nil); err == nil {
		t.Error("a suite of TLS 1.2 was taken")
	}
}

func TestUpdateIsDue(t *testing.T) {
	a, b := pair(t, tls.TLS_AES_128_GCM_SHA256)
	if a.UpdateDue() {
		t.Error("due at the start")
	}
	asks, err := a.AppendKeyUpdate(nil, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Open(asks); err != nil || !b.UpdateDue() {
		t.Errorf("the peer asked, due %v, error %v", b.UpdateDue(), err)
	}
	answer, _ := b.AppendKeyUpdate(nil, false)
	if _, err := a.Open(answer); err != nil || a.UpdateDue() || b.UpdateDue() {
		t.Errorf("after the answer: %v", err)
	}
	a.out.seq = a.out.suite.limit
	if !a.UpdateDue() {
		t.Error("not due at the limit of the key")
	}
}

func TestRefuses(t *testing.T) {
	message := func(p ...byte) func(*Conn) []byte {
		return func(c *Conn) []byte { return c.appendRecord(nil, typeHandshake, p) }
	}
	tests := map[string]struct {
		rec   func(*Conn) []byte
		alert uint8
	}{
		"tampered":              {func(c *Conn) []byte { r := sealed(c, []byte("x")); r[6] ^= 1; return r }, alertBadRecordMAC},
		"out of order":          {func(c *Conn) []byte { sealed(c, []byte("x")); return sealed(c, []byte("y")) }, alertBadRecordMAC},
		"cleartext":             {func(*Conn) []byte { return append([]byte{22, 3, 3, 0, 20}, make([]byte, 20)...) }, alertUnexpectedMessage},
		"too short":             {func(*Conn) []byte { return []byte{23, 3, 3, 0, 1, 0} }, alertDecodeError},
		"no content type":       {func(c *Conn) []byte { return c.appendRecord(nil, 0, []byte{0, 0}) }, alertUnexpectedMessage},
		"too much plaintext":    {func(c *Conn) []byte { return c.appendRecord(nil, typeData, make([]byte, MaxPlain+1)) }, alertRecordOverflow},
		"unknown content type":  {func(c *Conn) []byte { return c.appendRecord(nil, 99, []byte{1}) }, alertUnexpectedMessage},
		"renegotiation":         {message(0, 0, 0, 0), alertUnexpectedMessage},
		"long KeyUpdate":        {message(messageKeyUpdate, 0, 0, 2, 0, 0), alertDecodeError},
		"KeyUpdate with a wish": {message(messageKeyUpdate, 0, 0, 1, 2), alertDecodeError},
		"KeyUpdate and more":    {message(messageKeyUpdate, 0, 0, 1, 0, messageTicket), alertUnexpectedMessage},
		"giant message":         {message(messageTicket, 255, 255, 255), alertDecodeError},
		"short alert":           {func(c *Conn) []byte { return c.appendRecord(nil, typeAlert, []byte{2}) }, alertDecodeError},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t, tls.TLS_AES_128_GCM_SHA256)
			_, err := b.Open(tt.rec(a))
			var alert *AlertError
			if !errors.As(err, &alert) || !alert.Local || uint8(alert.Alert) != tt.alert {
				t.Fatalf("got %v, want local alert %d", err, tt.alert)
			}
			if _, again := b.Open(sealed(a, []byte("z"))); again != err {
				t.Errorf("the error is not final: %v", again)
			}
			if _, err := a.Open(b.AppendAlert(nil, err)); !errors.As(err, &alert) || alert.Local || uint8(alert.Alert) != tt.alert {
				t.Errorf("the peer sees %v", err)
			}
		})
	}
	a, b := pair(t, tls.TLS_AES_128_GCM_SHA256)
	if _, err := b.Length([]byte{23, 3, 3, 0x41, 1}); err == nil {
		t.Error("a record of 16641 bytes was taken")
	}
	ticket := []byte{messageTicket, 0, 0, 1, 7}
	a, b = pair(t, tls.TLS_AES_128_GCM_SHA256)
	for i := range maxUseless + 1 {
		_, err := b.Open(a.appendRecord(nil, typeHandshake, ticket))
		if (err != nil) != (i == maxUseless) {
			t.Fatalf("ticket %d: %v", i, err)
		}
	}
}

func TestMessageInPieces(t *testing.T) {
	a, b := pair(t, tls.TLS_AES_128_GCM_SHA256)
	ticket := append([]byte{messageTicket, 0, 0x80, 0}, make([]byte, 0x8000)...)
	for len(ticket) > 0 {
		n := min(len(ticket), 10000)
		if p, err := b.Open(a.appendRecord(nil, typeHandshake, ticket[:n])); err != nil || p != nil {
			t.Fatal(err)
		}
		ticket = ticket[n:]
	}
	if p, err := b.Open(sealed(a, []byte("x"))); err != nil || string(p) != "x" {
		t.Errorf("after the ticket: %q, %v", p, err)
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(byte(23), []byte("data"))
	f.Add(byte(22), []byte{messageKeyUpdate, 0, 0, 1, 1})
	f.Add(byte(21), []byte{1, 0})
	f.Fuzz(func(t *testing.T, typ byte, p []byte) {
		if len(p) > MaxPlain || typ == 0 { // a type of zero is padding
			return
		}
		a, b := pair(t, tls.TLS_AES_128_GCM_SHA256)
		got, err := b.Open(a.appendRecord(nil, typ, p))
		if typ == typeData && err == nil && !bytes.Equal(got, p) {
			t.Errorf("got %q, want %q", got, p)
		}
		if typ != typeData && got != nil {
			t.Errorf("content type %d gives data", typ)
		}
	})
}

func BenchmarkSeal16K(b *testing.B) {
	x, _ := pair(b, tls.TLS_AES_128_GCM_SHA256)
	buf := make([]byte, HeaderLen+MaxPlain+TailLen)
	b.SetBytes(MaxPlain)
	for b.Loop() {
		x.Seal(buf, MaxPlain)
	}
}
