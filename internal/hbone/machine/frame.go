package machine

import "encoding/binary"

// Frame types, flags and settings of RFC 9113 §6.
const (
	frameData         = 0
	frameHeaders      = 1
	framePriority     = 2
	frameReset        = 3
	frameSettings     = 4
	framePush         = 5
	framePing         = 6
	frameGoAway       = 7
	frameWindowUpdate = 8
	frameContinuation = 9

	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20

	settingTableSize     = 1
	settingPush          = 2
	settingMaxStreams    = 3
	settingStreamWindow  = 4
	settingMaxFrame      = 5
	settingMaxHeaderList = 6

	preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
)

// HeaderLen is the length of a frame header.
const HeaderLen = 9

func putHeader(b []byte, n int, typ, flags byte, id uint32) {
	_ = b[8]
	b[0], b[1], b[2], b[3], b[4] = byte(n>>16), byte(n>>8), byte(n), typ, flags
	binary.BigEndian.PutUint32(b[5:], id)
}

func appendHeader(b []byte, n int, typ, flags byte, id uint32) []byte {
	return append(b, byte(n>>16), byte(n>>8), byte(n), typ, flags, byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
}

func appendUint32(b []byte, v uint32) []byte { return binary.BigEndian.AppendUint32(b, v) }

// appendUint32Frame appends a frame whose payload is one number: WINDOW_UPDATE or RST_STREAM.
func appendUint32Frame(b []byte, typ byte, id, v uint32) []byte {
	return appendUint32(appendHeader(b, 4, typ, 0, id), v)
}

func appendSettings(b []byte, set [][2]uint32) []byte {
	b = appendHeader(b, 6*len(set), frameSettings, 0, 0)
	for _, s := range set {
		b = appendUint32(binary.BigEndian.AppendUint16(b, uint16(s[0])), s[1])
	}
	return b
}
