package tlsrecord

import (
	"bytes"
	"encoding/hex"
	"errors"
)

// secrets collects the application traffic secrets that crypto/tls writes to Config.KeyLogWriter, its documented hook for
// them (NSS key log format). Nothing else of the handshake is kept. TestSecretsCome fails if a Go release stops this.
type secrets struct{ client, server []byte }

func (k *secrets) Write(p []byte) (int, error) {
	label, rest, _ := bytes.Cut(p, []byte{' '})
	_, secret, _ := bytes.Cut(bytes.TrimSpace(rest), []byte{' '})
	var dst *[]byte
	switch string(label) {
	case "CLIENT_TRAFFIC_SECRET_0":
		dst = &k.client
	case "SERVER_TRAFFIC_SECRET_0":
		dst = &k.server
	default:
		return len(p), nil
	}
	b := make([]byte, hex.DecodedLen(len(secret)))
	if _, err := hex.Decode(b, secret); err != nil {
		return 0, err
	}
	*dst = b
	return len(p), nil
}

var errNoSecrets = errors.New("crypto/tls did not give the traffic secrets")

// take returns the reading and the writing secret of one side.
func (k *secrets) take(server bool) (in, out []byte, err error) {
	if k.client == nil || k.server == nil {
		return nil, nil, errNoSecrets
	}
	if server {
		return k.client, k.server, nil
	}
	return k.server, k.client, nil
}
